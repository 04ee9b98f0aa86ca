//! Join tokens: `wft_<id>.<secret>.<fingerprint of the authority>`. The state holds a hash of the secret, so that a copy
//! of the state admits nobody. A token is used by one transaction, once (`enrol`).

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::secret_file::hex;
use super::{MemberName, Role, now_us};
use crate::state::{RowError, State};

const PREFIX: &str = "identity/token/";
/// Shorter than this nobody can carry it to a host; longer than a week it is a password.
pub const TTL_SECONDS: std::ops::RangeInclusive<u64> = 60..=604_800;
/// How long an expired token stays listed.
const KEPT_AFTER_EXPIRY_US: i64 = 7 * 86_400 * 1_000_000;
/// Labels per token, and so per member.
pub const MAX_LABELS: usize = 64;

pub fn key(id: &str) -> String {
    format!("{PREFIX}{id}")
}

/// A token as the state holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    pub id: String,
    /// BLAKE3 of the secret, in hexadecimal. The secret has 160 random bits: a slow hash would protect nothing.
    secret_hash: String,
    pub role: Role,
    pub labels: BTreeMap<String, String>,
    pub created_at_us: i64,
    pub expires_at_us: i64,
    pub created_by: String,
    pub used_by: Option<MemberName>,
    pub used_at_us: Option<i64>,
}

impl TokenRow {
    /// The row of the token once it has admitted somebody.
    pub fn used(&self, by: &MemberName, at_us: i64) -> Self {
        Self { used_by: Some(by.clone()), used_at_us: Some(at_us), ..self.clone() }
    }

    /// Whether the secret is this token's; compared in constant time.
    pub fn matches(&self, secret: &str) -> bool {
        blake3::Hash::from_hex(&self.secret_hash).is_ok_and(|expected| expected == blake3::hash(secret.as_bytes()))
    }
}

/// The parts of a token's text, unchecked.
pub struct TokenText<'a> {
    pub id: &'a str,
    pub secret: &'a str,
}

impl<'a> TokenText<'a> {
    pub fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.trim().strip_prefix("wft_")?.split('.');
        let (id, secret, _fingerprint) = (parts.next()?, parts.next()?, parts.next()?);
        let plain = |text: &str| {
            (1..=64).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        };
        (parts.next().is_none() && plain(id) && plain(secret)).then_some(Self { id, secret })
    }
}

/// What an admin asks for.
#[derive(Debug, Clone)]
pub struct NewToken {
    pub role: Role,
    pub ttl: Duration,
    pub labels: BTreeMap<String, String>,
    pub created_by: String,
}

/// Makes a token; its text exists in the answer only. Tokens long expired are removed on the way.
pub async fn create(state: &State, fingerprint: &str, new: NewToken) -> Result<(String, TokenRow), RowError> {
    let now = now_us();
    sweep(state, now).await?;
    let id = hex(&rand::random::<[u8; 5]>());
    let secret = hex(&rand::random::<[u8; 20]>());
    let row = TokenRow {
        id: id.clone(),
        secret_hash: blake3::hash(secret.as_bytes()).to_hex().to_string(),
        role: new.role,
        labels: new.labels,
        created_at_us: now,
        expires_at_us: now.saturating_add(i64::try_from(new.ttl.as_micros()).unwrap_or(i64::MAX)),
        created_by: new.created_by,
        used_by: None,
        used_at_us: None,
    };
    state.create_row(&key(&id), &row).await?;
    Ok((format!("wft_{id}.{secret}.{fingerprint}"), row))
}

/// All tokens, newest first.
pub async fn list(state: &State) -> Result<Vec<TokenRow>, RowError> {
    let (rows, _) = state.rows::<TokenRow>(PREFIX).await?;
    let mut tokens: Vec<_> = rows.into_iter().map(|row| row.value).collect();
    tokens.sort_by_key(|token| std::cmp::Reverse(token.created_at_us));
    Ok(tokens)
}

/// Removes a token; [`RowError::Absent`] if there is none. Who joined with it stays.
pub async fn revoke(state: &State, id: &str) -> Result<TokenRow, RowError> {
    // An id comes from outside: only what we make is looked up.
    let plain = id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let absent = || RowError::Absent { key: key(&id.chars().take(64).collect::<String>()) };
    let row = if plain { state.row::<TokenRow>(&key(id)).await? } else { None };
    let row = row.ok_or_else(absent)?;
    state.delete_row(&row).await?;
    Ok(row.value)
}

async fn sweep(state: &State, now: i64) -> Result<(), RowError> {
    let (rows, _) = state.rows::<TokenRow>(PREFIX).await?;
    for row in rows.into_iter().filter(|row| row.value.expires_at_us < now - KEPT_AFTER_EXPIRY_US) {
        match state.delete_row(&row).await {
            Ok(()) | Err(RowError::Conflict { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
