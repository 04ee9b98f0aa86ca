//! From the server's ERROR to ours, by SQLSTATE. Never by message: those are in the language of lc_messages.

use std::io;

use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::ErrorResponseBody;
use tokio_postgres::error::SqlState;
use walfleet_repository::postgres::{Lsn, Timeline};

use super::error::ReplicationError;
use crate::postgres::server::{Refusal, Target};

/// Who wanted to come in, and which way.
pub(super) struct Admission {
    pub user: String,
    pub is_local: bool,
}

/// What was asked of a stream.
#[derive(Clone, Debug)]
pub(super) struct StreamRequest {
    pub slot: Option<String>,
    pub at: Lsn,
    pub timeline: Timeline,
}

/// An ERROR or FATAL of the server, and what it was about.
pub(super) struct Complaint {
    operation: &'static str,
    target: Target,
    refusal: Box<Refusal>,
    /// The function in the server's source that complained.
    routine: String,
}

impl Complaint {
    pub fn parse(operation: &'static str, target: &Target, body: &ErrorResponseBody) -> io::Result<Complaint> {
        let mut refusal = Refusal { code: String::new(), message: String::new(), detail: None, hint: None };
        let mut routine = String::new();
        body.fields().for_each(|field| {
            let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'C' => refusal.code = value,
                b'M' => refusal.message = value,
                b'D' => refusal.detail = Some(value),
                b'H' => refusal.hint = Some(value),
                b'R' => routine = value,
                _ => {}
            }
            Ok(())
        })?;
        Ok(Complaint { operation, target: target.clone(), refusal: Box::new(refusal), routine })
    }

    fn is(&self, state: &SqlState) -> bool {
        self.refusal.code == state.code()
    }

    /// A server that shuts down takes no more commands, and says it with the state of many other things.
    fn is_of_stopping(&self) -> bool {
        self.is(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) && self.routine == "exec_replication_command"
    }

    pub fn into_error(self) -> ReplicationError {
        let ends = [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW];
        let is_end = self.is_of_stopping() || ends.iter().any(|state| self.is(state));
        let Complaint { operation, target, refusal, .. } = self;
        if is_end {
            return ReplicationError::Terminated { operation, target, refusal };
        }
        ReplicationError::Refused { operation, refusal }
    }

    pub fn of_connecting(self, admission: Admission) -> ReplicationError {
        let Admission { user, is_local } = admission;
        let role = quoted_role(&user);
        if self.is(&SqlState::CANNOT_CONNECT_NOW) {
            return ReplicationError::StartingUp { target: self.target, refusal: self.refusal };
        }
        if self.is(&SqlState::INSUFFICIENT_PRIVILEGE) {
            let grant = format!("ALTER ROLE {role} REPLICATION;");
            return ReplicationError::MissingRight { target: self.target, refusal: self.refusal, grant };
        }
        if self.is(&SqlState::TOO_MANY_CONNECTIONS) {
            return ReplicationError::NoSenderLeft { target: self.target, refusal: self.refusal };
        }
        let hint = if self.is(&SqlState::INVALID_PASSWORD) {
            "check user and password of the connection string, or pg_hba.conf.".to_owned()
        } else if self.is(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) {
            let line = if is_local {
                format!("local replication {role} peer")
            } else {
                format!("host replication {role} samehost scram-sha-256")
            };
            format!(
                "the role must exist and have LOGIN, and pg_hba.conf must admit it by a line for replication, which \
                 \"all\" does not cover: {line}"
            )
        } else {
            return self.into_error();
        };
        ReplicationError::Rejected { target: self.target, refusal: self.refusal, hint }
    }

    pub fn of_history(self, timeline: Timeline) -> ReplicationError {
        if self.is(&SqlState::UNDEFINED_FILE) {
            return ReplicationError::NoHistory { timeline, refusal: self.refusal };
        }
        self.into_error()
    }

    /// Of making or dropping it.
    pub fn of_slot(self, slot: &str) -> ReplicationError {
        let (operation, slot) = (self.operation, slot.to_owned());
        if self.is(&SqlState::DUPLICATE_OBJECT) {
            return ReplicationError::SlotExists { slot, refusal: self.refusal };
        }
        if self.is(&SqlState::CONFIGURATION_LIMIT_EXCEEDED) {
            return ReplicationError::NoSlotLeft { slot, refusal: self.refusal };
        }
        // CheckSlotRequirements and CheckSlotPermissions, src/backend/replication/slot.c.
        if self.is(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) && self.routine == "CheckSlotRequirements" {
            return ReplicationError::WalLevel { operation, refusal: self.refusal };
        }
        self.of_used_slot(slot)
    }

    fn of_used_slot(self, slot: String) -> ReplicationError {
        let operation = self.operation;
        if self.is(&SqlState::UNDEFINED_OBJECT) {
            return ReplicationError::NoSlot { operation, slot, refusal: self.refusal };
        }
        if self.is(&SqlState::OBJECT_IN_USE) {
            let pid = last_number(&self.refusal.message);
            return ReplicationError::SlotInUse { operation, slot, pid, refusal: self.refusal };
        }
        self.into_error()
    }

    /// Of START_REPLICATION, or of the stream that it began and that has come to `request.at`.
    pub fn of_stream(self, request: &StreamRequest) -> ReplicationError {
        let StreamRequest { slot, at, timeline } = request.clone();
        if self.is(&SqlState::UNDEFINED_FILE) {
            return ReplicationError::WalRemoved { timeline, at, refusal: self.refusal };
        }
        // StartReplication has no SQLSTATE for them; that the timeline is a stranger it explains in a detail.
        if self.is(&SqlState::INTERNAL_ERROR) && self.routine == "StartReplication" && self.refusal.detail.is_none() {
            return ReplicationError::Ahead { timeline, at, refusal: self.refusal };
        }
        if self.is(&SqlState::INTERNAL_ERROR) && ["StartReplication", "tliSwitchPoint"].contains(&&*self.routine) {
            return ReplicationError::NotInHistory { timeline, at, refusal: self.refusal };
        }
        let Some(slot) = slot else { return self.into_error() };
        if self.is(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE) && !self.is_of_stopping() {
            return ReplicationError::SlotInvalid { slot, refusal: self.refusal };
        }
        self.of_used_slot(slot)
    }
}

/// Message and detail on one line; the hint is left to who shows it.
pub(super) fn told(refusal: &Refusal) -> String {
    match &refusal.detail {
        Some(detail) => format!("{} ({detail})", refusal.message),
        None => refusal.message.clone(),
    }
}

/// As SQL takes it, and pg_hba.conf.
fn quoted_role(name: &str) -> String {
    let is_plain = name
        .bytes()
        .enumerate()
        .all(|(index, byte)| byte.is_ascii_lowercase() || byte == b'_' || (index > 0 && byte.is_ascii_digit()));
    if is_plain && !name.is_empty() { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

/// The process id stands last in "replication slot "x" is active for PID 123".
fn last_number(message: &str) -> Option<u32> {
    message.split(|letter: char| !letter.is_ascii_digit()).rfind(|digits| !digits.is_empty())?.parse().ok()
}
