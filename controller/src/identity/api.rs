//! The services of this room: Enrolment and Access. Conversions between their messages and `enrol`, `token`, `member`,
//! and the codes of their refusals; no decisions.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use walfleet_proto::agent::v1 as agent;
use walfleet_proto::agent::v1::enrolment_server::Enrolment as EnrolmentService;
use walfleet_proto::operator::v1 as operator;
use walfleet_proto::operator::v1::access_server::Access;

use super::enrol::{Enrolment, EnrolmentError, Join, check_labels};
use super::token::{self, NewToken, TTL_SECONDS, TokenRow};
use super::{Role, peer};
use crate::audit::{Actor, Audit};
use crate::state::{RowError, State};

/// Implements both services.
#[derive(Clone)]
pub struct IdentityApi {
    state: State,
    enrolment: Arc<Enrolment>,
    audit: Audit,
}

impl IdentityApi {
    pub fn new(state: State, enrolment: Arc<Enrolment>, audit: Audit) -> Self {
        Self { state, enrolment, audit }
    }
}

impl From<EnrolmentError> for Status {
    fn from(error: EnrolmentError) -> Self {
        let text = error.to_string();
        match error {
            EnrolmentError::UnknownToken | EnrolmentError::ExpiredToken { .. } | EnrolmentError::UsedToken { .. } => {
                Status::unauthenticated(text)
            }
            EnrolmentError::NameTaken { .. } => Status::already_exists(text),
            EnrolmentError::Invalid { .. } | EnrolmentError::Request(_) => Status::invalid_argument(text),
            EnrolmentError::NoSuchMember { .. } => Status::not_found(text),
            EnrolmentError::LastAdmin { .. } => Status::failed_precondition(text),
            EnrolmentError::Authority(error) => internal(&error),
            EnrolmentError::Row(error) => of_row(error),
        }
    }
}

/// A fault of the controller itself: logged where it is handled, and told with its causes, since the caller is often the
/// one who can make room on a disk.
fn internal(error: &(dyn std::error::Error + 'static)) -> Status {
    let text = crate::with_causes(error);
    tracing::error!(error = text, "a call failed");
    Status::internal(text)
}

fn of_row(error: RowError) -> Status {
    match error {
        RowError::Absent { .. } => Status::not_found(error.to_string()),
        RowError::Exists { .. } => Status::already_exists(error.to_string()),
        RowError::Conflict { .. } => Status::aborted(format!("{error}\nHINT: try again.")),
        RowError::State(_) | RowError::Decode { .. } | RowError::Encode { .. } => internal(&error),
    }
}

#[tonic::async_trait]
impl EnrolmentService for IdentityApi {
    async fn join(&self, request: Request<agent::JoinRequest>) -> Result<Response<agent::JoinReply>, Status> {
        let join = request.into_inner();
        let join = Join {
            token: join.token,
            name: join.name,
            csr_pem: join.csr_pem,
            writer_public_key: join.writer_public_key.to_vec(),
            recipient: join.recipient.to_vec(),
            labels: join.labels.into_iter().collect(),
            hostname: join.hostname,
        };
        // Refused attempts are not written down: anybody could fill the state with them. They are logged.
        let (member, issued) = self.enrolment.join(&join).await.inspect_err(|error| {
            tracing::warn!(name = %join.name.escape_debug(), %error, "refused to admit a member");
        })?;
        tracing::info!(name = %member.name, role = %member.role, token = member.enrolment, "admitted a member");
        let actor = Actor { name: member.name.to_string(), role: member.role.to_string() };
        self.audit.record(&actor, "Enrolment.Join", &format!("{} {}", member.role, member.name), &Ok(())).await;
        Ok(Response::new(agent::JoinReply {
            certificate_pem: issued.pem,
            authorities_pem: self.enrolment.authority().pem().to_owned(),
            not_after_us: issued.not_after_us,
            role: member.role.to_string(),
        }))
    }

    async fn renew(&self, request: Request<agent::RenewRequest>) -> Result<Response<agent::RenewReply>, Status> {
        let peer = peer(&request)?;
        // Not audited: it changes nobody's rights, and thousands of agents renew every few hours.
        let issued = self.enrolment.renew(&peer, &request.into_inner().csr_pem).await?;
        tracing::debug!(name = %peer.name, serial = issued.serial, "renewed a certificate");
        Ok(Response::new(agent::RenewReply {
            certificate_pem: issued.pem,
            authorities_pem: self.enrolment.authority().pem().to_owned(),
            not_after_us: issued.not_after_us,
        }))
    }
}

#[tonic::async_trait]
impl Access for IdentityApi {
    async fn create_token(
        &self,
        request: Request<operator::CreateTokenRequest>,
    ) -> Result<Response<operator::CreateTokenReply>, Status> {
        let actor = Actor::from(&peer(&request)?);
        let wanted = request.into_inner();
        let role = wanted.role.clone();
        let created = self.create(wanted, &actor).await;
        let object = match &created {
            Ok((_, row)) => format!("token {} ({})", row.id, row.role),
            Err(_) => format!("token ({role})"),
        };
        self.audit.record(&actor, "Access.CreateToken", &object, &created).await;
        let (token, row) = created?;
        Ok(Response::new(operator::CreateTokenReply { token, id: row.id, expires_at_us: row.expires_at_us }))
    }

    async fn list_tokens(
        &self,
        _: Request<operator::ListTokensRequest>,
    ) -> Result<Response<operator::ListTokensReply>, Status> {
        let tokens = token::list(&self.state).await.map_err(of_row)?;
        Ok(Response::new(operator::ListTokensReply { tokens: tokens.into_iter().map(view).collect() }))
    }

    async fn revoke_token(
        &self,
        request: Request<operator::RevokeTokenRequest>,
    ) -> Result<Response<operator::RevokeTokenReply>, Status> {
        let actor = Actor::from(&peer(&request)?);
        let id = request.into_inner().id;
        let revoked = token::revoke(&self.state, &id).await.map(drop).map_err(|error| match error {
            RowError::Absent { .. } => Status::not_found(format!(
                "there is no token {:?}\nHINT: `walfleet token list` shows them.",
                id.chars().take(64).collect::<String>()
            )),
            other => of_row(other),
        });
        self.audit.record(&actor, "Access.RevokeToken", &format!("token {id}"), &revoked).await;
        revoked.map(|()| Response::new(operator::RevokeTokenReply {}))
    }

    async fn revoke_agent(
        &self,
        request: Request<operator::RevokeAgentRequest>,
    ) -> Result<Response<operator::RevokeAgentReply>, Status> {
        let actor = Actor::from(&peer(&request)?);
        let name = request.into_inner().name;
        let revoked = self.enrolment.revoke(&name, &actor.name).await.map_err(Status::from);
        self.audit.record(&actor, "Access.RevokeAgent", &name, &revoked).await;
        let member = revoked?;
        tracing::info!(name = %member.name, role = %member.role, by = actor.name, "revoked a member");
        Ok(Response::new(operator::RevokeAgentReply {}))
    }

    async fn who_am_i(
        &self,
        request: Request<operator::WhoAmIRequest>,
    ) -> Result<Response<operator::WhoAmIReply>, Status> {
        let peer = peer(&request)?;
        Ok(Response::new(operator::WhoAmIReply {
            name: peer.name.to_string(),
            role: peer.role.to_string(),
            certificate_not_after_us: peer.not_after_us,
        }))
    }
}

impl IdentityApi {
    async fn create(&self, wanted: operator::CreateTokenRequest, actor: &Actor) -> Result<(String, TokenRow), Status> {
        let role: Role =
            wanted.role.parse().map_err(|error: super::BadRole| Status::invalid_argument(error.to_string()))?;
        if !TTL_SECONDS.contains(&wanted.ttl_seconds) {
            let (from, to) = TTL_SECONDS.into_inner();
            let found = wanted.ttl_seconds;
            let text = format!("ttl_seconds is {found}\nHINT: a token lives between {from} and {to} seconds.");
            return Err(Status::invalid_argument(text));
        }
        let labels = wanted.labels.into_iter().collect();
        check_labels(&labels).map_err(|problem| Status::invalid_argument(format!("labels are refused: {problem}")))?;
        let ttl = Duration::from_secs(wanted.ttl_seconds);
        let new = NewToken { role, ttl, labels, created_by: actor.name.clone() };
        token::create(&self.state, &self.enrolment.authority().fingerprint(), new).await.map_err(of_row)
    }
}

fn view(row: TokenRow) -> operator::TokenView {
    operator::TokenView {
        id: row.id,
        role: row.role.to_string(),
        created_at_us: row.created_at_us,
        expires_at_us: row.expires_at_us,
        created_by: row.created_by,
        used_by: row.used_by.map(String::from).unwrap_or_default(),
        used_at_us: row.used_at_us.unwrap_or_default(),
        labels: row.labels.into_iter().collect(),
    }
}
