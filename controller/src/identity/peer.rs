//! Who is at the other end of a connection, as its certificate says. Whether that still holds is the roster's question.

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;

use super::secret_file::hex;
use super::{MemberName, Role};

/// The holder of a verified client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    pub name: MemberName,
    pub role: Role,
    /// Of the certificate, in hexadecimal.
    pub serial: String,
    /// Which admission of this name the certificate belongs to.
    pub enrolment: String,
    /// End of the certificate's life, microseconds since the Unix epoch.
    pub not_after_us: i64,
}

impl PeerIdentity {
    /// Reads a certificate that our authority signed. Anything it would not have written is refused.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let names = parsed.subject_alternative_name().ok()??;
        let [GeneralName::URI(uri)] = names.value.general_names[..] else { return None };
        let (name, role, enrolment) = parse_uri(uri)?;
        Some(Self {
            name,
            role,
            serial: hex(parsed.raw_serial()),
            enrolment,
            not_after_us: parsed.validity().not_after.timestamp().saturating_mul(1_000_000),
        })
    }
}

fn parse_uri(uri: &str) -> Option<(MemberName, Role, String)> {
    let (path, query) = uri.strip_prefix("walfleet://")?.split_once('?')?;
    let (kind, name) = path.split_once('/')?;
    let (role, enrolment) = match kind {
        "agent" => (Role::Agent, query.strip_prefix("enrolment=")?),
        "operator" => {
            let (role, enrolment) = query.strip_prefix("role=")?.split_once("&enrolment=")?;
            let role = role.parse().ok().filter(|role| *role != Role::Agent)?;
            (role, enrolment)
        }
        _ => return None,
    };
    Some((name.parse().ok()?, role, enrolment.to_owned()))
}

/// The caller of a request that came through the door: a method behind a role always has one.
pub fn peer<T>(request: &tonic::Request<T>) -> Result<PeerIdentity, tonic::Status> {
    request.extensions().get::<PeerIdentity>().cloned().ok_or_else(|| {
        tonic::Status::unauthenticated("this call needs a client certificate\nHINT: join with a token first.")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uris_we_write_are_read() {
        for bad in [
            "walfleet://agent/db1",
            "walfleet://agent/DB1?enrolment=a",
            "walfleet://agent/db1/x?enrolment=a",
            "walfleet://operator/ann?enrolment=a",
            "walfleet://operator/ann?role=agent&enrolment=a",
            "walfleet://operator/ann?role=root&enrolment=a",
            "walfleet://controller/x?enrolment=a",
            "https://agent/db1?enrolment=a",
        ] {
            assert_eq!(parse_uri(bad), None, "{bad}");
        }
        let (name, role, enrolment) = parse_uri("walfleet://operator/ann?role=admin&enrolment=e").unwrap();
        assert_eq!((name.as_str(), role, enrolment.as_str()), ("ann", Role::Admin, "e"));
    }
}
