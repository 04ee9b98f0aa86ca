//! Key files: a few lines of text that hold a recipient secret and a signing seed.
//!
//! The *recovery* key file is the fleet's root: it opens every domain key and signs anything. It is made once and kept
//! offline. A *host* key file is an agent's own: it opens the domain keys granted to that host and signs what its
//! certificates allow.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::crypto::{self, CryptoError, RecipientSecret};

const FIRST_LINE: &str = "walfleet-key: 1";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyKind {
    /// The root of trust of its repositories.
    Recovery,
    /// One host's.
    Host,
}

/// The secrets of a key file.
#[derive(Clone)]
pub struct KeyFile {
    pub kind: KeyKind,
    pub recipient: RecipientSecret,
    /// Of an Ed25519 key (RFC 8032).
    pub signing_seed: Zeroizing<[u8; 32]>,
}

impl std::fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyFile({:?} {})", self.kind, self.recipient.id())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("read key file {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("write key file {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("key file {path} exists already\nHINT: a key is never overwritten; name another file, or use this one.")]
    Exists { path: PathBuf },
    #[error("key file {path} may be read by others (mode {mode:03o})\nHINT: chmod 600 {path}")]
    Permissions { path: PathBuf, mode: u32 },
    #[error(
        "key file {path}, line {line}: {problem}\nHINT: a key file begins with \"walfleet-key: 1\" and has the lines kind, recipient-secret and signing-seed."
    )]
    Syntax { path: PathBuf, line: usize, problem: String },
    #[error("key file {path}: {source}")]
    Key { path: PathBuf, source: CryptoError },
}

impl KeyFile {
    pub fn generate(kind: KeyKind) -> Result<KeyFile, CryptoError> {
        let signing_seed = Zeroizing::new(crypto::random()?);
        Ok(KeyFile { kind, recipient: RecipientSecret::generate()?, signing_seed })
    }

    /// Reads a key file that nobody but its owner (and root) may read.
    pub fn read(path: &Path) -> Result<KeyFile, KeyFileError> {
        let fail = |source| KeyFileError::Read { path: path.to_owned(), source };
        let mut file = std::fs::File::open(path).map_err(fail)?;
        let mode = file.metadata().map_err(fail)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyFileError::Permissions { path: path.to_owned(), mode });
        }
        let mut text = Zeroizing::new(String::new());
        Read::take(&mut file, 64 << 10).read_to_string(&mut text).map_err(fail)?;
        KeyFile::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<KeyFile, KeyFileError> {
        let syntax =
            |line, problem: &str| KeyFileError::Syntax { path: path.to_owned(), line, problem: problem.into() };
        let (mut kind, mut recipient, mut seed, mut version) = (None, None, None, false);
        for (index, line) in text.lines().enumerate() {
            let (number, line) = (index + 1, line.trim());
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if !version {
                if line != FIRST_LINE {
                    return Err(syntax(number, "this is not a walfleet key file of version 1"));
                }
                version = true;
                continue;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| syntax(number, "no \"name: value\""))?;
            let secret =
                || from_hex(value.trim()).ok_or_else(|| syntax(number, "the value is not 64 hexadecimal digits"));
            match name {
                "kind" => {
                    kind = Some(match value.trim() {
                        "recovery" => KeyKind::Recovery,
                        "host" => KeyKind::Host,
                        _ => return Err(syntax(number, "kind is neither recovery nor host")),
                    });
                }
                "recipient-secret" => recipient = Some(secret()?),
                "signing-seed" => seed = Some(secret()?),
                _ => return Err(syntax(number, "unknown line")),
            }
        }
        let last = text.lines().count();
        let recipient = recipient.ok_or_else(|| syntax(last, "recipient-secret is missing"))?;
        let recipient = RecipientSecret::from_bytes(*recipient)
            .map_err(|source| KeyFileError::Key { path: path.to_owned(), source })?;
        Ok(KeyFile {
            kind: kind.ok_or_else(|| syntax(last, "kind is missing"))?,
            recipient,
            signing_seed: seed.ok_or_else(|| syntax(last, "signing-seed is missing"))?,
        })
    }

    /// Writes the file for its owner alone, durably. Refuses to overwrite anything.
    pub fn create(&self, path: &Path) -> Result<(), KeyFileError> {
        let fail = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::AlreadyExists => KeyFileError::Exists { path: path.to_owned() },
            _ => KeyFileError::Write { path: path.to_owned(), source },
        };
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(fail)?;
        file.write_all(self.to_text().as_bytes()).and_then(|()| file.sync_all()).map_err(fail)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(parent).and_then(|folder| folder.sync_all()).map_err(fail)
    }

    fn to_text(&self) -> Zeroizing<String> {
        let (kind, comment) = match self.kind {
            KeyKind::Recovery => (
                "recovery",
                "# The recovery key of a walfleet repository. Whoever has it can read every backup, and without it and\n\
                 # without any host's key no backup can ever be read again. Keep a copy offline.\n",
            ),
            KeyKind::Host => ("host", "# This host's walfleet key. It never leaves the host.\n"),
        };
        let mut text = Zeroizing::new(String::new());
        let _ = write!(
            text,
            "{comment}{FIRST_LINE}\nkind: {kind}\nrecipient-secret: {}\nsigning-seed: {}\n",
            &*to_hex(self.recipient.secret_bytes()),
            &*to_hex(&self.signing_seed),
        );
        text
    }
}

fn to_hex(bytes: &[u8; 32]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(64));
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn from_hex(text: &str) -> Option<Zeroizing<[u8; 32]>> {
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = Zeroizing::new([0; 32]);
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_survives_being_written_and_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recovery.key");
        let key = KeyFile::generate(KeyKind::Recovery).unwrap();
        key.create(&path).unwrap();
        let read = KeyFile::read(&path).unwrap();
        assert_eq!(read.recipient.id(), key.recipient.id());
        assert_eq!(read.signing_seed, key.signing_seed);
        assert_eq!(read.kind, KeyKind::Recovery);
        assert!(matches!(key.create(&path), Err(KeyFileError::Exists { .. })));
    }

    #[test]
    fn a_key_file_that_others_may_read_or_that_is_not_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        KeyFile::generate(KeyKind::Host).unwrap().create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(KeyFile::read(&path), Err(KeyFileError::Permissions { mode: 0o640, .. })));
        for text in ["", "hello", "walfleet-key: 2", "walfleet-key: 1\nkind: host\nrecipient-secret: 00\n"] {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(KeyFile::read(&path), Err(KeyFileError::Syntax { .. })), "{text:?}");
        }
    }
}
