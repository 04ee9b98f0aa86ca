//! Why a call did not do what it should, told so that an operator knows where to look.

use std::error::Error;

use rustls::CertificateError;
use tonic::{Code, Status, TimeoutExpired};

use crate::exit::Exit;

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error(
        "controller {address} is unreachable: {reason}\nHINT: see that it runs and that this machine may reach that \
         address; another one is chosen with --context or walfleet context use."
    )]
    Unreachable { address: String, reason: String },
    /// It answered, and is not whom we trust.
    #[error("controller {address} {problem}\nHINT: {hint}.")]
    Untrusted { address: String, problem: String, hint: &'static str },
    /// It does not take our certificate.
    #[error("controller {address} refuses this operator's certificate: {problem}\nHINT: {hint}.")]
    IdentityRefused { address: String, problem: String, hint: &'static str },
    #[error(
        "connect to {address}: {reason}\nHINT: the context's certificate, key or URL cannot be used; log in again."
    )]
    Configuration { address: String, reason: String },
    #[error("{operation}: {message}")]
    Answered { operation: &'static str, code: Code, message: String },
}

impl CallError {
    pub fn exit(&self) -> Exit {
        match self {
            CallError::Unreachable { .. } | CallError::Untrusted { .. } => Exit::Unreachable,
            CallError::IdentityRefused { .. } => Exit::Refused,
            CallError::Configuration { .. } => Exit::Usage,
            CallError::Answered { code, .. } => Exit::of_status(*code),
        }
    }

    /// Whether a controller that restarts, fails over or is drained explains it: the same call may do later.
    pub fn may_pass(&self) -> bool {
        match self {
            CallError::Unreachable { .. } => true,
            CallError::Answered { code, .. } => match code {
                Code::Unavailable | Code::Aborted | Code::Cancelled | Code::Unknown | Code::ResourceExhausted => true,
                Code::DeadlineExceeded | Code::Internal => true,
                Code::Ok
                | Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::FailedPrecondition
                | Code::OutOfRange
                | Code::Unimplemented
                | Code::DataLoss => false,
            },
            CallError::Untrusted { .. } | CallError::IdentityRefused { .. } | CallError::Configuration { .. } => false,
        }
    }

    pub(super) fn configuration(address: &str, error: &tonic::transport::Error) -> CallError {
        CallError::Configuration { address: address.to_owned(), reason: innermost(error) }
    }

    pub(super) fn not_connected(address: &str, error: &tonic::transport::Error) -> CallError {
        tls_problem(address, error).unwrap_or_else(|| unreachable_at(address, innermost(error)))
    }

    pub(super) fn of_status(operation: &'static str, address: &str, status: &Status) -> CallError {
        if let Some(source) = status.source() {
            if let Some(problem) = tls_problem(address, source) {
                return problem;
            }
            if chain(source).any(|cause| cause.is::<TimeoutExpired>()) {
                return unreachable_at(address, format!("it did not answer in time ({operation})"));
            }
            // A status with a source was made on this side: the transport broke.
            return unreachable_at(address, innermost(source));
        }
        let said = status.message().trim();
        let message = match (status.code(), said.is_empty()) {
            (Code::Unimplemented, true) => format!(
                "the controller at {address} does not know this call: not in this version\nHINT: walfleet status shows \
                 the controller's version."
            ),
            (Code::Unauthenticated, _) if !said.contains("HINT:") => {
                format!(
                    "{said}\nHINT: the operator's certificate or token is not accepted; get a new token and log in again."
                )
            }
            (code, true) => format!("the controller answered {}", code_name(code)),
            (_, false) => said.to_owned(),
        };
        CallError::Answered { operation, code: status.code(), message }
    }
}

fn unreachable_at(address: &str, reason: String) -> CallError {
    CallError::Unreachable { address: address.to_owned(), reason }
}

/// Every error below, `error` first. `io::Error::source` skips the error it wraps, which is the one that tells.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    fn below<'a>(cause: &&'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
        let cause = *cause;
        match cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => cause.source(),
        }
    }
    std::iter::successors(Some(error), below)
}

/// The cause that says most; the layers above it only say "transport error".
fn innermost(error: &(dyn Error + 'static)) -> String {
    chain(error).last().map(ToString::to_string).unwrap_or_default()
}

fn tls_problem(address: &str, error: &(dyn Error + 'static)) -> Option<CallError> {
    let address = address.to_owned();
    let Some(tls) = chain(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) else {
        let (problem, hint) = alert_meaning(&late_alert(error)?);
        return Some(CallError::IdentityRefused { address, problem, hint });
    };
    let untrusted = |problem: String, hint| Some(CallError::Untrusted { address: address.clone(), problem, hint });
    match tls {
        rustls::Error::InvalidCertificate(reason) => match reason {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => untrusted(
                "shows a certificate that this context's authorities did not issue".to_owned(),
                "it is another fleet's controller, or somebody is in between; if the authority was renewed, log in again",
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => untrusted(
                "shows a certificate that has expired".to_owned(),
                "compare the clocks of both machines; the controller renews its own certificate",
            ),
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                untrusted("shows a certificate that is not valid yet".to_owned(), "compare the clocks of both machines")
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => untrusted(
                format!("shows a certificate for other names ({reason})"),
                "use one of those names in the context's `controller`, or set its `server_name`",
            ),
            CertificateError::ApplicationVerificationFailure => untrusted(
                "is not the one that made this token: no certificate it shows has the token's fingerprint".to_owned(),
                "check the URL and the token; somebody may be in between",
            ),
            other => untrusted(
                format!("shows a certificate that does not hold: {other}"),
                "log in again; if that does not help, the controller's certificate must be renewed",
            ),
        },
        rustls::Error::AlertReceived(alert) => {
            let (problem, hint) = alert_meaning(&format!("{alert:?}"));
            Some(CallError::IdentityRefused { address, problem, hint })
        }
        rustls::Error::InvalidMessage(_) => untrusted(
            "does not speak TLS".to_owned(),
            "the port may belong to another service; see the controller's `listen` setting",
        ),
        other => untrusted(format!("cannot agree on a secure connection: {other}"), "see the controller's log"),
    }
}

/// With TLS 1.3 our certificate is judged after the handshake, while HTTP/2 already runs; that layer keeps of the
/// error only its text (h2, `proto::Error::Io`; rustls, `Display` of `Error::AlertReceived`).
fn late_alert(error: &(dyn Error + 'static)) -> Option<String> {
    let text = innermost(error);
    let (_, alert) = text.split_once("received fatal alert: ")?;
    Some(alert.trim().to_owned())
}

/// By the names of RFC 8446, section 6.2, as rustls prints them.
fn alert_meaning(alert: &str) -> (String, &'static str) {
    match alert {
        "CertificateExpired" => ("it has expired".to_owned(), "get a new token from an admin and log in again"),
        "CertificateRevoked" => ("it was revoked".to_owned(), "ask an admin; a new token gives a new identity"),
        "UnknownCA" | "BadCertificate" | "DecryptError" => (
            "another authority issued it".to_owned(),
            "the context belongs to another fleet, or the fleet has a new authority: log in again",
        ),
        "CertificateRequired" => {
            ("none was shown".to_owned(), "the context needs `certificate` and `key`: log in again")
        }
        other => (format!("TLS alert {other}"), "log in again; the controller's log says more"),
    }
}

fn code_name(code: Code) -> String {
    format!("{code:?} ({})", code.description())
}
