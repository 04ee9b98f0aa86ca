//! A join token: which token, its secret, and by which certificate authority the fleet is known.

use std::fmt;
use std::str::FromStr;

/// `wft_<id>.<secret>.<fingerprint>`: the last part is how a host that knows nothing yet tells the fleet's authority
/// from an impostor.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    text: String,
    fingerprint: AuthorityFingerprint,
}

/// The first 8 bytes of the SHA-256 of a certificate's DER.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AuthorityFingerprint([u8; 8]);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "this is not a join token: {problem}\nHINT: copy the whole line that `walfleet token create --role agent` printed; it looks like wft_….….…"
)]
pub struct TokenError {
    problem: &'static str,
}

impl JoinToken {
    /// As it was typed: what the controller is sent.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn fingerprint(&self) -> AuthorityFingerprint {
        self.fingerprint
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<JoinToken, TokenError> {
        let bad = |problem| TokenError { problem };
        let text = text.trim();
        let rest = text.strip_prefix("wft_").ok_or(bad("it does not begin with \"wft_\""))?;
        let parts: Vec<&str> = rest.split('.').collect();
        let [id, secret, fingerprint] = parts.as_slice() else {
            return Err(bad("it does not have three parts"));
        };
        if [id, secret]
            .iter()
            .any(|part| part.is_empty() || !part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'))
        {
            return Err(bad("a part is empty, or has characters that no token has"));
        }
        let fingerprint =
            AuthorityFingerprint::parse(fingerprint).ok_or(bad("its last part is not 16 hexadecimal digits"))?;
        Ok(JoinToken { text: text.to_owned(), fingerprint })
    }
}

/// The secret stays out of logs.
impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken(…{})", self.fingerprint)
    }
}

impl AuthorityFingerprint {
    pub fn of_certificate(der: &[u8]) -> AuthorityFingerprint {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        let mut first = [0; 8];
        first.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
        AuthorityFingerprint(first)
    }

    fn parse(text: &str) -> Option<AuthorityFingerprint> {
        if text.len() != 16 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        u64::from_str_radix(text, 16).ok().map(|value| AuthorityFingerprint(value.to_be_bytes()))
    }
}

impl fmt::Display for AuthorityFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AuthorityFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_authority_and_hides_its_secret() {
        let token: JoinToken = " wft_1a2b.s3cret.00ff00ff00ff00ff\n".parse().unwrap();
        assert_eq!(token.text(), "wft_1a2b.s3cret.00ff00ff00ff00ff");
        assert_eq!(token.fingerprint().to_string(), "00ff00ff00ff00ff");
        assert!(!format!("{token:?}").contains("s3cret"));
        for bad in [
            "",
            "x_1.2.00ff00ff00ff00ff",
            "wft_1.2",
            "wft_1..00ff00ff00ff00ff",
            "wft_1.2.00ff",
            "wft_1.2.3.00ff00ff00ff00ff",
        ] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
    }
}
