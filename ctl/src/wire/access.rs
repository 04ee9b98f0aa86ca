//! Tokens, admission, and who the caller is.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use walfleet_proto::operator::v1 as proto;
use walfleet_proto::operator::v1::access_client::AccessClient;

use super::{moment, text};
use crate::client::{CallError, Client, LARGEST_ANSWER, Transport};
use crate::view::token::{NewToken, Token};

/// The caller, as the controller knows it.
pub struct Caller {
    pub name: String,
    pub role: String,
    pub certificate_not_after: Option<Timestamp>,
}

impl Client {
    fn access(&self) -> AccessClient<Transport> {
        AccessClient::new(self.transport()).max_decoding_message_size(LARGEST_ANSWER)
    }

    pub async fn create_token(
        &self,
        role: &str,
        ttl: Duration,
        labels: &BTreeMap<String, String>,
    ) -> Result<NewToken, CallError> {
        let request = self.request(proto::CreateTokenRequest {
            role: role.to_owned(),
            ttl_seconds: ttl.as_secs(),
            labels: labels.clone().into_iter().collect(),
        });
        let reply = self.access().create_token(request).await.map_err(self.failed("create token"))?.into_inner();
        let program = if role == "agent" { "walfleet-agent join" } else { "walfleet login" };
        Ok(NewToken {
            command: format!("{program} --controller https://{} --token {}", self.address(), reply.token),
            id: reply.id,
            token: reply.token,
            role: role.to_owned(),
            expires_at: moment(reply.expires_at_us),
        })
    }

    pub async fn tokens(&self) -> Result<Vec<Token>, CallError> {
        let request = self.request(proto::ListTokensRequest {});
        let reply = self.access().list_tokens(request).await.map_err(self.failed("list tokens"))?.into_inner();
        Ok(reply.tokens.into_iter().map(Token::from).collect())
    }

    pub async fn revoke_token(&self, id: &str) -> Result<(), CallError> {
        let request = self.request(proto::RevokeTokenRequest { id: id.to_owned() });
        self.access().revoke_token(request).await.map_err(self.failed("revoke token"))?;
        Ok(())
    }

    pub async fn revoke_agent(&self, name: &str) -> Result<(), CallError> {
        let request = self.request(proto::RevokeAgentRequest { name: name.to_owned() });
        self.access().revoke_agent(request).await.map_err(self.failed("revoke agent"))?;
        Ok(())
    }

    pub async fn who_am_i(&self) -> Result<Caller, CallError> {
        let request = self.request(proto::WhoAmIRequest {});
        let reply = self.access().who_am_i(request).await.map_err(self.failed("ask who we are"))?.into_inner();
        Ok(Caller { name: reply.name, role: reply.role, certificate_not_after: moment(reply.certificate_not_after_us) })
    }
}

impl From<proto::TokenView> for Token {
    fn from(wire: proto::TokenView) -> Token {
        Token {
            id: wire.id,
            role: wire.role,
            created_at: moment(wire.created_at_us),
            created_by: wire.created_by,
            expires_at: moment(wire.expires_at_us),
            used_by: text(wire.used_by),
            used_at: moment(wire.used_at_us),
            labels: wire.labels.into_iter().collect(),
        }
    }
}
