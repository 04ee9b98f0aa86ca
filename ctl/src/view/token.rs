//! Join tokens.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use crate::print::{Page, Table, View, labels};

#[derive(Debug, Serialize)]
pub struct NewToken {
    pub id: String,
    /// Shown this once.
    pub token: String,
    pub role: String,
    pub expires_at: Option<Timestamp>,
    /// What to type where it is to be used.
    pub command: String,
}

impl View for NewToken {
    /// The token alone: scripts and people copy the line. What to do with it stands on stderr.
    fn draw(&self, page: &mut Page) {
        page.line(&self.token);
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Token {
    pub id: String,
    pub role: String,
    pub created_at: Option<Timestamp>,
    pub created_by: String,
    pub expires_at: Option<Timestamp>,
    pub used_by: Option<String>,
    pub used_at: Option<Timestamp>,
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
pub struct Tokens {
    pub tokens: Vec<Token>,
}

impl View for Tokens {
    fn draw(&self, page: &mut Page) {
        if self.tokens.is_empty() {
            page.line("No tokens.");
            return;
        }
        let mut table = Table::new(&["ID", "ROLE", "STATE", "EXPIRES", "CREATED BY", "+CREATED", "LABELS"]);
        for token in &self.tokens {
            let state = match &token.used_by {
                Some(name) => format!("used by {name} {}", page.short_when(token.used_at)),
                None if token.expires_at.is_some_and(|at| at <= page.now) => "expired".to_owned(),
                None => "open".to_owned(),
            };
            table.row([
                token.id.clone(),
                token.role.clone(),
                state,
                page.when(token.expires_at),
                token.created_by.clone(),
                page.when(token.created_at),
                labels(&token.labels),
            ]);
        }
        page.table(table);
    }
}
