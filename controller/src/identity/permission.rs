//! What each call needs, and the layer in front of all services that enforces it. A method that is not in the table
//! does not exist: a new one cannot be open by oversight.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::{PeerIdentity, Refusal, Role, Roster, now_us};
use crate::serve::Connection;

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Whoever reaches the port; the method itself demands a token.
    Nothing,
    /// Any member in force.
    Membership,
    /// As `Membership`, or with a certificate that ended within the renewal grace.
    RenewableMembership,
    /// The role, or one that includes it.
    Role(Role),
}

const ENROLMENT: &[(&str, Needs)] = &[("Join", Needs::Nothing), ("Renew", Needs::RenewableMembership)];
const AGENT_LINK: &[(&str, Needs)] = &[("Attach", Needs::Role(Role::Agent))];
const ACCESS: &[(&str, Needs)] = &[
    ("CreateToken", Needs::Role(Role::Admin)),
    ("ListTokens", Needs::Role(Role::Admin)),
    ("RevokeToken", Needs::Role(Role::Admin)),
    ("RevokeAgent", Needs::Role(Role::Admin)),
    ("WhoAmI", Needs::Membership),
];
const FLEET: &[(&str, Needs)] = &[
    ("Status", Needs::Role(Role::Viewer)),
    ("ListClusters", Needs::Role(Role::Viewer)),
    ("GetCluster", Needs::Role(Role::Viewer)),
    ("ListAgents", Needs::Role(Role::Viewer)),
    ("GetAgent", Needs::Role(Role::Viewer)),
    ("ListBackups", Needs::Role(Role::Viewer)),
    ("GetBackup", Needs::Role(Role::Viewer)),
];
const JOBS: &[(&str, Needs)] = &[
    ("StartBackup", Needs::Role(Role::Operator)),
    ("StartRestore", Needs::Role(Role::Operator)),
    ("StartVerify", Needs::Role(Role::Operator)),
    ("StartBackupPlan", Needs::Role(Role::Operator)),
    ("StartWalFind", Needs::Role(Role::Operator)),
    ("GetJob", Needs::Role(Role::Viewer)),
    ("ListJobs", Needs::Role(Role::Viewer)),
    ("WatchJob", Needs::Role(Role::Viewer)),
    ("CancelJob", Needs::Role(Role::Operator)),
];
const RESOURCES: &[(&str, Needs)] = &[
    // A dry run is reading: `Apply` itself demands an admin for anything else.
    ("Apply", Needs::Role(Role::Viewer)),
    ("ListResources", Needs::Role(Role::Viewer)),
    ("DeleteResource", Needs::Role(Role::Admin)),
];
const WAL: &[(&str, Needs)] = &[("AcknowledgeGap", Needs::Role(Role::Operator))];
const REPLICAS: &[(&str, Needs)] = &[("ListReplicas", Needs::Role(Role::Viewer))];
const RETENTION: &[(&str, Needs)] = &[
    ("PlanRetention", Needs::Role(Role::Viewer)),
    ("ReleaseRetention", Needs::Role(Role::Admin)),
    ("UndeleteBackup", Needs::Role(Role::Operator)),
    ("PlaceHold", Needs::Role(Role::Operator)),
    ("ListHolds", Needs::Role(Role::Viewer)),
    ("ReleaseHold", Needs::Role(Role::Admin)),
    ("CollectRepository", Needs::Role(Role::Operator)),
];
/// It names people and what they tried.
const AUDIT: &[(&str, Needs)] = &[("ListEntries", Needs::Role(Role::Admin)), ("VerifyLog", Needs::Role(Role::Admin))];
const SERVICES: &[(&str, &[(&str, Needs)])] = &[
    ("walfleet.agent.v1.Enrolment", ENROLMENT),
    ("walfleet.agent.v1.AgentLink", AGENT_LINK),
    ("walfleet.operator.v1.Access", ACCESS),
    ("walfleet.operator.v1.Audit", AUDIT),
    ("walfleet.operator.v1.Fleet", FLEET),
    ("walfleet.operator.v1.Jobs", JOBS),
    ("walfleet.operator.v1.Replicas", REPLICAS),
    ("walfleet.operator.v1.Resources", RESOURCES),
    ("walfleet.operator.v1.Retention", RETENTION),
    ("walfleet.operator.v1.Wal", WAL),
];

fn find(path: &str) -> Option<(&'static str, &'static (&'static str, Needs))> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    let (service, methods) = SERVICES.iter().find(|(name, _)| *name == service)?;
    Some((service, methods.iter().find(|(name, _)| *name == method)?))
}

/// What the method at this path ("/package.Service/Method") needs; `None`: there is no such method.
pub fn needs(path: &str) -> Option<Needs> {
    find(path).map(|(_, (_, needs))| *needs)
}

/// Service and method at this path, as the table has them.
pub fn method(path: &str) -> Option<(&'static str, &'static str)> {
    find(path).map(|(service, (method, _))| (service, *method))
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::Revoked { .. } => Code::PermissionDenied,
            Refusal::Expired { .. } | Refusal::Replaced { .. } | Refusal::Unknown { .. } => Code::Unauthenticated,
        };
        Status::new(code, refusal.to_string())
    }
}

/// Refuses a caller that has not at least `needed`; for methods whose need depends on the request.
pub fn demand(peer: &PeerIdentity, needed: Role) -> Result<(), Status> {
    if peer.role.covers(needed) {
        return Ok(());
    }
    Err(Status::permission_denied(format!(
        "{} has role {}, and this needs {needed}\nHINT: use a context with role {needed}, or ask an admin.",
        peer.name, peer.role
    )))
}

/// Decides about one call; the caller's identity is handed on to the method.
pub struct Gate {
    roster: Arc<Roster>,
    renewal_grace: Duration,
}

impl Gate {
    pub fn new(roster: Arc<Roster>, renewal_grace: Duration) -> Self {
        Self { roster, renewal_grace }
    }

    pub async fn admit(&self, path: &str, peer: Option<&PeerIdentity>) -> Result<(), Status> {
        let Some(needs) = needs(path) else {
            let path: String = path.chars().take(120).collect();
            return Err(Status::unimplemented(format!(
                "this controller does not know {path}\nHINT: compare the versions of controller and caller."
            )));
        };
        if needs == Needs::Nothing {
            return Ok(());
        }
        let Some(peer) = peer else {
            return Err(Status::unauthenticated(
                "this call needs a client certificate of this fleet\nHINT: join with a token first.",
            ));
        };
        match self.roster.check(peer).await {
            Ok(()) => {}
            Err(Refusal::Expired { .. }) if needs == Needs::RenewableMembership && self.in_grace(peer) => {}
            Err(refusal) => return Err(refusal.into()),
        }
        match needs {
            Needs::Nothing | Needs::Membership | Needs::RenewableMembership => Ok(()),
            Needs::Role(role) => demand(peer, role),
        }
    }

    fn in_grace(&self, peer: &PeerIdentity) -> bool {
        let grace = i64::try_from(self.renewal_grace.as_micros()).unwrap_or(i64::MAX);
        now_us() < peer.not_after_us.saturating_add(grace)
    }
}

/// Puts the gate in front of services.
#[derive(Clone)]
pub struct GateLayer {
    gate: Arc<Gate>,
}

impl GateLayer {
    pub fn new(gate: Gate) -> Self {
        Self { gate: Arc::new(gate) }
    }
}

impl<S> Layer<S> for GateLayer {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.gate.clone(), inner }
    }
}

#[derive(Clone)]
pub struct Gated<S> {
    gate: Arc<Gate>,
    inner: S,
}

type HttpRequest = http::Request<tonic::body::Body>;
type HttpResponse = http::Response<tonic::body::Body>;

impl<S> Service<HttpRequest> for Gated<S>
where
    S: Service<HttpRequest, Response = HttpResponse> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = HttpResponse;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<HttpResponse, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: HttpRequest) -> Self::Future {
        // The clone that was polled ready is the one to call.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let gate = self.gate.clone();
        Box::pin(async move {
            let peer = request.extensions().get::<Connection>().and_then(|connection| connection.peer.clone());
            if let Err(status) = gate.admit(request.uri().path(), peer.as_ref()).await {
                let name = peer.as_ref().map_or("nobody", |peer| peer.name.as_str());
                let method = request.uri().path();
                tracing::info!(peer = name, method, code = ?status.code(), reason = status.message(), "refused a call");
                return Ok(status.into_http());
            }
            if let Some(peer) = peer {
                request.extensions_mut().insert(peer);
            }
            inner.call(request).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Every method of the contracts stands in the table, and nothing else does.
    #[test]
    fn every_method_has_a_need() {
        let mut methods = Vec::new();
        for file in [
            "agent/v1/enrolment",
            "agent/v1/link",
            "operator/v1/access",
            "operator/v1/audit",
            "operator/v1/fleet",
            "operator/v1/jobs",
            "operator/v1/replicas",
            "operator/v1/resources",
            "operator/v1/retention",
            "operator/v1/wal",
        ] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../proto/walfleet/{file}.proto"));
            let text = std::fs::read_to_string(path).unwrap();
            let find = |word: &str| {
                text.lines()
                    .filter_map(|line| line.trim().strip_prefix(word))
                    .filter_map(|rest| rest.split([' ', '(', '{', ';']).next())
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            };
            let (package, service) = (find("package ").remove(0), find("service ").remove(0));
            methods.extend(find("rpc ").iter().map(|method| format!("/{package}.{service}/{method}")));
        }
        let known = SERVICES
            .iter()
            .flat_map(|(service, methods)| methods.iter().map(move |(method, _)| format!("/{service}/{method}")));
        let (mut known, mut methods): (Vec<_>, _) = (known.collect(), methods);
        known.sort();
        methods.sort();
        assert_eq!(known, methods);
    }
}
