//! Who may talk to the controller, and as whom.
//!
//! The controller is the fleet's certificate authority. A single-use token admits a member (an agent or an operator);
//! its key never leaves it: it sends a signing request and gets a certificate whose whole content is ours. The
//! certificate carries name, role and *enrolment* as one URI, `walfleet://agent/<name>?enrolment=<id>` or
//! `walfleet://operator/<name>?role=<role>&enrolment=<id>`. An enrolment is one admission of one member: every call
//! must come from the member's present enrolment, so that revoking or re-admitting a name refuses every certificate
//! issued before, without a list of serial numbers. Names are one namespace for agents and operators.
//!
//! It never holds a data key: `keeper_key` signs what writers may do, and reads nothing.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub mod api;
pub mod authority;
pub mod enrol;
pub mod keeper_key;
pub mod member;
pub mod peer;
pub mod permission;
pub mod secret_file;
pub mod server_certificate;
pub mod signing_request;
pub mod token;

pub use authority::{Authority, AuthorityError};
pub use enrol::{Enrolment, EnrolmentError};
pub use keeper_key::KeeperKey;
pub use member::{Member, Refusal, Roster};
pub use peer::{PeerIdentity, peer};

/// Microseconds since the Unix epoch, now.
pub(crate) fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

/// What a member may do. Operators' roles include those before them; an agent's is apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// A host: acts as itself, on its own clusters.
    Agent,
    /// Sees everything that is no secret.
    Viewer,
    /// Starts and cancels jobs.
    Operator,
    /// Declares resources, admits and revokes members.
    Admin,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    /// Whether this role includes `needed`.
    pub fn covers(self, needed: Role) -> bool {
        let rank = |role| match role {
            Self::Agent => None,
            Self::Viewer => Some(1),
            Self::Operator => Some(2),
            Self::Admin => Some(3),
        };
        match (rank(self), rank(needed)) {
            (Some(own), Some(needed)) => own >= needed,
            _ => self == needed,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = BadRole;

    fn from_str(text: &str) -> Result<Self, BadRole> {
        [Self::Agent, Self::Viewer, Self::Operator, Self::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| BadRole { text: text.chars().take(40).collect() })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a role\nHINT: roles are agent, viewer, operator and admin.")]
pub struct BadRole {
    text: String,
}

/// An agent's or operator's name: safe in keys, URIs and host names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemberName(String);

impl MemberName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a name\nHINT: use 1 to 63 of a-z, 0-9, '-', '_' and '.', and begin with a letter or digit.")]
pub struct BadName {
    text: String,
}

impl FromStr for MemberName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = text.bytes().next().is_some_and(plain)
            && text.bytes().all(|byte| plain(byte) || matches!(byte, b'-' | b'_' | b'.'))
            && text.len() <= 63;
        if valid { Ok(Self(text.to_owned())) } else { Err(BadName { text: text.chars().take(80).collect() }) }
    }
}

impl TryFrom<String> for MemberName {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<MemberName> for String {
    fn from(name: MemberName) -> String {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_roles_include_the_lower_ones_and_agents_stand_apart() {
        use Role::*;
        for (own, covered) in [
            (Agent, vec![Agent]),
            (Viewer, vec![Viewer]),
            (Operator, vec![Viewer, Operator]),
            (Admin, vec![Viewer, Operator, Admin]),
        ] {
            for needed in [Agent, Viewer, Operator, Admin] {
                assert_eq!(own.covers(needed), covered.contains(&needed), "{own} for {needed}");
            }
        }
    }
}
