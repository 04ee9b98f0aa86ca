//! What can go wrong with a request to the store, and when.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use s3s::{Body, HttpError, HttpResponse};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Refused before anything happened: 503 SlowDown, 500, 409 ConditionalRequestConflict, 403.
    Status(u16),
    /// Done after a delay.
    Slow(Duration),
    /// Never answered; nothing happens.
    Hang,
    /// The connection is cut before anything happened.
    Cut,
    /// The connection is cut after so many bytes of the request's body; nothing is stored.
    TornRequest(usize),
    /// Done, and then the connection is cut instead of an answer.
    AnswerLost,
    /// Answered with the right headers, but the connection is cut after so many bytes of the body.
    TornAnswer(usize),
}

/// Which requests a fault befalls.
#[derive(Clone, Debug)]
pub struct Rule {
    fault: Fault,
    method: Option<&'static str>,
    path_contains: String,
    spared: u64,
    remaining: u64,
    /// Strikes every so many matching requests; `matched` counts them.
    every: u64,
    matched: u64,
}

impl Rule {
    /// Every request.
    pub fn new(fault: Fault) -> Rule {
        Rule { fault, method: None, path_contains: String::new(), spared: 0, remaining: u64::MAX, every: 1, matched: 0 }
    }

    pub fn method(mut self, method: &'static str) -> Rule {
        self.method = Some(method);
        self
    }

    pub fn path_contains(mut self, text: &str) -> Rule {
        self.path_contains = text.to_owned();
        self
    }

    /// Lets so many matching requests pass first.
    pub fn after(mut self, count: u64) -> Rule {
        self.spared = count;
        self
    }

    /// Strikes one in so many matching requests.
    pub fn one_in(mut self, count: u64) -> Rule {
        self.every = count;
        self
    }

    /// Strikes so many times at most.
    pub fn times(mut self, count: u64) -> Rule {
        self.remaining = count;
        self
    }

    fn matches(&self, method: &str, path: &str) -> bool {
        self.remaining > 0 && self.method.is_none_or(|wanted| wanted == method) && path.contains(&self.path_contains)
    }
}

#[derive(Default)]
pub(super) struct Faults {
    rules: Mutex<Vec<Rule>>,
    strikes: AtomicU64,
}

impl Faults {
    pub(super) fn add(&self, rule: Rule) {
        self.rules.lock().expect("no holder panics").push(rule);
    }

    pub(super) fn clear(&self) {
        self.rules.lock().expect("no holder panics").clear();
    }

    pub(super) fn strikes(&self) -> u64 {
        self.strikes.load(Ordering::Relaxed)
    }

    /// The fault that befalls this request: the first rule that strikes decides.
    pub(super) fn strike(&self, method: &str, path: &str) -> Option<Fault> {
        let mut rules = self.rules.lock().expect("no holder panics");
        let rule = rules.iter_mut().filter(|rule| rule.matches(method, path)).find_map(|rule| {
            rule.matched += 1;
            let due = rule.matched > rule.spared && (rule.matched - rule.spared).is_multiple_of(rule.every);
            due.then_some(rule)
        })?;
        rule.remaining -= 1;
        self.strikes.fetch_add(1, Ordering::Relaxed);
        Some(rule.fault)
    }
}

/// An error as S3 words it.
pub(super) fn refusal(status: u16) -> HttpResponse {
    let code = match status {
        503 => "SlowDown",
        409 => "ConditionalRequestConflict",
        403 => "AccessDenied",
        _ => "InternalError",
    };
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>injected</Message></Error>");
    let mut response = HttpResponse::new(Body::from(body));
    *response.status_mut() = http::StatusCode::from_u16(status).expect("tests inject valid statuses");
    response
}

pub(super) async fn read_some(mut body: Incoming, bytes: usize) {
    let mut read = 0;
    while read < bytes
        && let Some(Ok(frame)) = body.frame().await
    {
        read += frame.data_ref().map_or(0, Bytes::len);
    }
}

/// Keeps the headers, the content's length among them, and breaks off within the body.
pub(super) async fn tear(response: HttpResponse, bytes: usize) -> Result<HttpResponse, HttpError> {
    let (head, body) = response.into_parts();
    let body = body.collect().await.map_err(HttpError::new)?.to_bytes();
    let part = body.slice(..bytes.min(body.len().saturating_sub(1)));
    let torn = stream::iter([
        Ok(Frame::data(part)),
        Err::<Frame<Bytes>, std::io::Error>(std::io::Error::other("torn on purpose")),
    ]);
    Ok(HttpResponse::from_parts(head, Body::http_body_unsync(StreamBody::new(torn))))
}
