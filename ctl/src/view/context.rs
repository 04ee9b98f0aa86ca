//! Contexts of this user, without their keys.

use jiff::Timestamp;
use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, Table, View};

#[derive(Debug, Serialize)]
pub struct ContextLine {
    pub name: String,
    pub current: bool,
    pub controller: Option<String>,
    /// The operator's name and role, as the certificate has them.
    pub operator: Option<String>,
    pub certificate_not_after: Option<Timestamp>,
    pub path: String,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct ContextList {
    pub contexts: Vec<ContextLine>,
}

impl View for ContextList {
    fn draw(&self, page: &mut Page) {
        if self.contexts.is_empty() {
            page.line("No contexts. Make one: walfleet context add NAME admin.context.yaml, or walfleet login");
            return;
        }
        let mut table =
            Table::new(&["CURRENT", "NAME", "CONTROLLER", "OPERATOR", "CERTIFICATE UNTIL", "+FILE", "PROBLEM"]);
        for context in &self.contexts {
            let until = page.when(context.certificate_not_after);
            let expired = context.certificate_not_after.is_some_and(|at| at <= page.now);
            table.row([
                if context.current { "*" } else { " " }.to_owned(),
                context.name.clone(),
                context.controller.clone().unwrap_or_default(),
                context.operator.clone().unwrap_or_default(),
                if expired { Ink::Bad.on(&until) } else { until },
                context.path.clone(),
                context.problem.clone().unwrap_or_default(),
            ]);
        }
        page.table(table);
    }
}

/// The answer of `login`.
#[derive(Debug, Serialize)]
pub struct LoggedIn {
    pub context: String,
    pub controller: String,
    pub name: String,
    pub role: String,
    pub certificate_not_after: Option<Timestamp>,
    pub path: String,
}

impl View for LoggedIn {
    fn draw(&self, page: &mut Page) {
        let until = page.when(self.certificate_not_after);
        page.line(format!("logged in to {} as {}, role {}, until {until}", self.controller, self.name, self.role));
        page.line(format!("context {} is current", self.context));
    }
}
