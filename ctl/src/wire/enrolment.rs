//! How an operator becomes one, and stays one.

use jiff::Timestamp;
use walfleet_proto::agent::v1 as proto;
use walfleet_proto::agent::v1::enrolment_client::EnrolmentClient;

use super::{insist, moment};
use crate::client::pinned::Token;
use crate::client::{CallError, Client, Transport};

/// What the controller gives to who shows a good token.
pub struct Admission {
    pub certificate: String,
    pub authorities: String,
    pub not_after: Option<Timestamp>,
    /// "agent", or an operator's role.
    pub role: String,
}

/// A certificate for the same name and key.
pub struct Renewal {
    pub certificate: String,
    pub authorities: String,
}

impl Client {
    fn enrolment(&self) -> EnrolmentClient<Transport> {
        EnrolmentClient::new(self.transport())
    }

    /// Sent again if the answer is lost: the controller knows the same token with the same key.
    pub async fn join(&self, token: &Token, name: &str, csr: &str, hostname: &str) -> Result<Admission, CallError> {
        let message = proto::JoinRequest {
            token: token.as_str().to_owned(),
            name: name.to_owned(),
            csr_pem: csr.to_owned(),
            hostname: hostname.to_owned(),
            // The rest is for agents: operators write nothing to repositories and hold no data key.
            ..proto::JoinRequest::default()
        };
        let attempt = || async { self.enrolment().join(self.request(message.clone())).await };
        let reply = insist(attempt).await.map_err(self.failed("log in"))?.into_inner();
        Ok(Admission {
            certificate: reply.certificate_pem,
            authorities: reply.authorities_pem,
            not_after: moment(reply.not_after_us),
            role: reply.role,
        })
    }

    pub async fn renew(&self, csr: &str) -> Result<Renewal, CallError> {
        let request = self.request(proto::RenewRequest { csr_pem: csr.to_owned() });
        let reply = self.enrolment().renew(request).await.map_err(self.failed("renew certificate"))?.into_inner();
        Ok(Renewal { certificate: reply.certificate_pem, authorities: reply.authorities_pem })
    }
}
