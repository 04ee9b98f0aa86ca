//! What keeps this host from being protected, and what to type about it.
//!
//! Observing is in `doctor/examine.rs`; what an observation means is decided here and in `doctor/server.rs`, in pure
//! functions. Doctor changes nothing, but for a probe object where a repository is asked to prove itself.

use serde::Serialize;
use walfleet_repository::shipping::ShippingSpec;

pub mod examine;
mod server;
#[cfg(test)]
pub(crate) use server::tests;

pub use server::{ServerView, server_findings};

use crate::postgres::server::ServerFacts;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// It works; it could be better.
    Advice,
    /// It must be done before this host is protected.
    Fix,
}

impl Verdict {
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Advice => "advice",
            Verdict::Fix => "FIX",
        }
    }
}

/// The outcome of one check.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// What was checked: "archive_command".
    pub check: &'static str,
    /// Of what: a cluster's name, a repository's, or "agent".
    pub subject: String,
    pub verdict: Verdict,
    pub message: String,
    /// What to type, or to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// Everything, and whether a person must act.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    pub healthy: bool,
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    pub fn new(findings: Vec<Finding>) -> Diagnosis {
        Diagnosis { healthy: findings.iter().all(|finding| finding.verdict != Verdict::Fix), findings }
    }
}

impl Finding {
    pub fn ok(check: &'static str, subject: &str, message: impl Into<String>) -> Finding {
        Finding { check, subject: subject.to_owned(), verdict: Verdict::Ok, message: message.into(), fix: None }
    }

    pub fn advice(check: &'static str, subject: &str, message: impl Into<String>, fix: impl Into<String>) -> Finding {
        let (message, fix) = (message.into(), Some(fix.into()));
        Finding { check, subject: subject.to_owned(), verdict: Verdict::Advice, message, fix }
    }

    pub fn fix(check: &'static str, subject: &str, message: impl Into<String>, fix: impl Into<String>) -> Finding {
        let (message, fix) = (message.into(), Some(fix.into()));
        Finding { check, subject: subject.to_owned(), verdict: Verdict::Fix, message, fix }
    }

    /// From an error whose last line may be a hint, which becomes the fix.
    pub fn from_error(check: &'static str, subject: &str, error: &dyn std::error::Error) -> Finding {
        let text = crate::identity::connect::chain(error);
        match text.split_once("\nHINT: ") {
            Some((message, hint)) => Finding::fix(check, subject, message, hint),
            None => Finding::fix(check, subject, text, "see the message"),
        }
    }
}

/// What the controller is told of a server that answers: all that must be fixed, in a line each. `streams`: whether its WAL
/// is received over the replication protocol.
pub fn server_problems(facts: &ServerFacts, streams: bool, shipping: ShippingSpec) -> Vec<String> {
    let view = ServerView { facts, rights: None, socket: None, program: None, streams, shipping };
    let findings = server_findings("", &view);
    findings.into_iter().filter(|finding| finding.verdict == Verdict::Fix).map(|finding| finding.message).collect()
}
