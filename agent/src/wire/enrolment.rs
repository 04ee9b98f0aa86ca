//! The calls by which a host becomes a member and stays one.

use std::collections::BTreeMap;

use tonic::Status;
use tonic::transport::Channel;
use walfleet_proto::agent::v1 as proto;

/// What a joining host says of itself.
#[derive(Clone, Debug)]
pub struct JoinAsk {
    pub token: String,
    pub name: String,
    pub csr_pem: String,
    pub writer_public_key: [u8; 32],
    pub recipient: [u8; 32],
    pub labels: BTreeMap<String, String>,
    pub hostname: String,
}

/// What the controller signed.
#[derive(Clone, Debug)]
pub struct Enrolled {
    pub certificate_pem: String,
    pub authorities_pem: String,
}

pub struct Enrolment(proto::enrolment_client::EnrolmentClient<Channel>);

impl Enrolment {
    pub fn new(channel: Channel) -> Enrolment {
        Enrolment(proto::enrolment_client::EnrolmentClient::new(channel))
    }

    pub async fn join(&mut self, ask: JoinAsk) -> Result<Enrolled, Status> {
        let request = proto::JoinRequest {
            token: ask.token,
            name: ask.name,
            csr_pem: ask.csr_pem,
            writer_public_key: ask.writer_public_key.to_vec().into(),
            recipient: ask.recipient.to_vec().into(),
            labels: ask.labels.into_iter().collect(),
            hostname: ask.hostname,
        };
        let reply = self.0.join(request).await?.into_inner();
        Ok(Enrolled { certificate_pem: reply.certificate_pem, authorities_pem: reply.authorities_pem })
    }

    pub async fn renew(&mut self, csr_pem: String) -> Result<Enrolled, Status> {
        let reply = self.0.renew(proto::RenewRequest { csr_pem }).await?.into_inner();
        Ok(Enrolled { certificate_pem: reply.certificate_pem, authorities_pem: reply.authorities_pem })
    }
}
