//! The calls by which a host becomes a member and stays one.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Request, Status};
use walfleet_proto::agent::v1 as proto;
use walfleet_proto::operator::v1::WhoAmIRequest;
use walfleet_proto::operator::v1::access_client::AccessClient;

/// A controller that is well answers at once; a person waits.
const WHO_AM_I_TIMEOUT: Duration = Duration::from_secs(10);

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

/// What a controller answers a member who asks nothing of it.
#[derive(Clone, Debug)]
pub struct Met {
    /// The member's name and role; or why it is not taken for one, perhaps with a hint.
    pub known_as: Result<(String, String), String>,
    /// Its clock, to the second: the `date` of any answer (RFC 9110, 6.6.1). `None` if it says none.
    pub clock: Option<Timestamp>,
}

/// The call that any member may make and that changes nothing.
pub async fn who_am_i(channel: Channel) -> Met {
    let mut request = Request::new(WhoAmIRequest {});
    request.set_timeout(WHO_AM_I_TIMEOUT);
    match AccessClient::new(channel).who_am_i(request).await {
        Ok(reply) => {
            let clock = clock(reply.metadata());
            let reply = reply.into_inner();
            Met { known_as: Ok((reply.name, reply.role)), clock }
        }
        Err(status) => Met { known_as: Err(status.message().to_owned()), clock: clock(status.metadata()) },
    }
}

fn clock(headers: &MetadataMap) -> Option<Timestamp> {
    let date = headers.get("date")?.to_str().ok()?;
    jiff::fmt::rfc2822::parse(date).ok().map(|date| date.timestamp())
}
