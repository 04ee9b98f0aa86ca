//! The audit log.

use jiff::Timestamp;
use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::audit_client::AuditClient;

use super::{moment, number};
use crate::client::{CallError, Client, LARGEST_ANSWER, Transport};
use crate::view::audit::{AuditEntry, AuditLog, VerifiedLog};

impl Client {
    fn audit(&self) -> AuditClient<Transport> {
        AuditClient::new(self.transport()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub async fn audit_entries(&self, since: Option<Timestamp>, limit: u32) -> Result<AuditLog, CallError> {
        let since_us = since.map_or(0, Timestamp::as_microsecond);
        let request = self.request(proto::ListEntriesRequest { since_us, limit });
        let reply = self.audit().list_entries(request).await.map_err(self.failed("list the audit log"))?.into_inner();
        let entries = reply.entries.into_iter().map(AuditEntry::from).collect();
        Ok(AuditLog { entries, first: number(reply.first), last: number(reply.last) })
    }

    pub async fn verify_audit(&self) -> Result<VerifiedLog, CallError> {
        let request = self.request(proto::VerifyLogRequest {});
        let reply = self.audit().verify_log(request).await.map_err(self.failed("verify the audit log"))?.into_inner();
        let entries = if reply.last == 0 { 0 } else { reply.last.saturating_sub(reply.first).saturating_add(1) };
        Ok(VerifiedLog { first: number(reply.first), last: number(reply.last), entries, head_hash: reply.head_hash })
    }
}

impl From<proto::AuditEntry> for AuditEntry {
    fn from(wire: proto::AuditEntry) -> AuditEntry {
        AuditEntry {
            sequence: wire.sequence,
            at: moment(wire.at_us),
            actor: wire.actor,
            role: wire.role,
            call: wire.call,
            object: wire.object,
            outcome: wire.outcome,
            previous: wire.previous,
            hash: wire.hash,
        }
    }
}
