//! This program.

use serde::Serialize;

use crate::print::{Page, View};

#[derive(Debug, Serialize)]
pub struct Version {
    pub version: &'static str,
}

impl View for Version {
    fn draw(&self, page: &mut Page) {
        page.line(format!("walfleet {}", self.version));
    }
}
