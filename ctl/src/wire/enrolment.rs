//! How an operator becomes one.

use jiff::Timestamp;
use walfleet_proto::agent::v1 as proto;
use walfleet_proto::agent::v1::enrolment_client::EnrolmentClient;

use super::moment;
use crate::client::pinned::Token;
use crate::client::{CallError, Client};

/// What the controller gives to who shows a good token.
pub struct Admission {
    pub certificate: String,
    pub authorities: String,
    pub not_after: Option<Timestamp>,
    /// "agent", or an operator's role.
    pub role: String,
}

impl Client {
    pub async fn join(&self, token: &Token, name: &str, csr: &str, hostname: &str) -> Result<Admission, CallError> {
        let request = self.request(proto::JoinRequest {
            token: token.as_str().to_owned(),
            name: name.to_owned(),
            csr_pem: csr.to_owned(),
            hostname: hostname.to_owned(),
            // The rest is for agents: operators write nothing to repositories and hold no data key.
            ..proto::JoinRequest::default()
        });
        let reply = EnrolmentClient::new(self.transport()).join(request).await.map_err(self.failed("log in"))?;
        let reply = reply.into_inner();
        Ok(Admission {
            certificate: reply.certificate_pem,
            authorities: reply.authorities_pem,
            not_after: moment(reply.not_after_us),
            role: reply.role,
        })
    }
}
