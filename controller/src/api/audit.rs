//! `Audit`: what was done to the fleet, by whom. Reading only.

use tonic::{Request, Response, Status};
use walfleet_proto::operator::v1 as pb;
use walfleet_proto::operator::v1::audit_server::Audit;

use super::Api;
use super::status::of_row;
use crate::audit::{AuditError, Entry};

/// When the caller names no number.
const USUAL: u32 = 100;
/// About 5 MB; more is for `state export`.
const MOST: u32 = 10_000;

fn of_audit(error: AuditError) -> Status {
    match error {
        AuditError::Row(error) => of_row(error),
        AuditError::Broken { .. } => {
            tracing::error!(%error, "the audit log does not verify");
            Status::data_loss(error.to_string())
        }
    }
}

fn entry_out(entry: Entry) -> pb::AuditEntry {
    let Entry { sequence, at_us, actor, role, call, object, outcome, previous, hash } = entry;
    pb::AuditEntry { sequence, at_us, actor, role, call, object, outcome, previous, hash }
}

#[tonic::async_trait]
impl Audit for Api {
    async fn list_entries(
        &self,
        request: Request<pb::ListEntriesRequest>,
    ) -> Result<Response<pb::ListEntriesReply>, Status> {
        let pb::ListEntriesRequest { since_us, limit } = request.into_inner();
        let limit = if limit == 0 { USUAL } else { limit };
        if limit > MOST {
            return Err(Status::invalid_argument(format!(
                "limit is {limit}\nHINT: at most {MOST} entries are told at once; `walfleet-controller state export` has all."
            )));
        }
        let newest = self.audit.newest(u64::from(limit), since_us).await.map_err(of_audit)?;
        Ok(Response::new(pb::ListEntriesReply {
            entries: newest.entries.into_iter().map(entry_out).collect(),
            first: newest.first,
            last: newest.last,
        }))
    }

    async fn verify_log(&self, _: Request<pb::VerifyLogRequest>) -> Result<Response<pb::VerifyLogReply>, Status> {
        let whole = self.audit.verify().await.map_err(of_audit)?;
        Ok(Response::new(pb::VerifyLogReply { first: whole.first, last: whole.last, head_hash: whole.head_hash }))
    }
}
