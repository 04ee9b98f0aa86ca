//! What operators say of WAL.

use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::wal_client::WalClient;

use super::insist;
use crate::client::{CallError, Client, Transport};
use crate::target::NumberedTimeline;
use crate::view::wal::RepositoryGap;

impl Client {
    fn wal(&self) -> WalClient<Transport> {
        WalClient::new(self.transport())
    }

    /// The gap as it is acknowledged now. Sent again where the answer is lost: said twice, it is still said.
    pub async fn acknowledge_gap(
        &self,
        cluster: &str,
        (from_lsn, to_lsn): (&str, &str),
        timeline: Option<NumberedTimeline>,
        reason: &str,
    ) -> Result<RepositoryGap, CallError> {
        let timeline = timeline.unwrap_or_default();
        let message = proto::AcknowledgeGapRequest {
            cluster: cluster.to_owned(),
            from_lsn: from_lsn.to_owned(),
            to_lsn: to_lsn.to_owned(),
            timeline: timeline.number,
            branch: timeline.branch,
            reason: reason.to_owned(),
        };
        let attempt = || async { self.wal().acknowledge_gap(self.request(message.clone())).await };
        let reply = insist(attempt).await.map_err(self.failed("acknowledge gap"))?.into_inner();
        Ok(RepositoryGap { repository: reply.repository, gap: reply.gap.unwrap_or_default().into() })
    }
}
