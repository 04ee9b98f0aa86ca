//! `init`: a repository for a host, or a few, without a controller.

use serde::Serialize;
use walfleet_repository::format::root::AppendMode;
use walfleet_repository::key_file::{KeyFile, KeyKind};
use walfleet_repository::open::{Initialised, Repository, RepositorySpec};
use walfleet_repository::signature::Signer;
use walfleet_repository::store::{Folder, Store, StoreOptions};

use crate::access::repository_failure;
use crate::cli::{InitArgs, print, usage};
use crate::config::RepositoryConfig;
use crate::failure::{ExitCode, Failure, Remedy};

#[derive(Serialize)]
struct Report {
    repository: String,
    url: String,
    key_file: String,
    /// Whether this call made it.
    made: bool,
    key_made: bool,
    /// Whether hosts may back up to it by themselves.
    atomic_create: bool,
}

pub fn init(args: &InitArgs) -> Result<(), Failure> {
    let options: std::collections::BTreeMap<_, _> = args.options.iter().cloned().collect();
    let wanted =
        RepositoryConfig { url: args.repository.clone(), options: options.clone(), key_file: args.key_file.clone() };
    wanted.validate("--repository").map_err(usage)?;
    super::run_async(&super::quiet(), |_| async move {
        let (key, key_made) = recovery_key(args)?;
        let options = StoreOptions { folder: Folder::Create, settings: options, ..StoreOptions::default() };
        let store = Store::open(&args.repository, &options)
            .map_err(|error| Failure::new("repository.store", ExitCode::Failed, Remedy::Operator, error))?;
        let spec = RepositorySpec {
            root_public_key: Signer::from_seed(&key.signing_seed).public_key(),
            recovery_recipient: key.recipient.id(),
        };
        let (repository, done) = Repository::init(store, spec).await.map_err(|error| repository_failure(&error))?;
        let report = Report {
            repository: repository.id().to_string(),
            url: args.repository.clone(),
            key_file: args.key_file.display().to_string(),
            made: matches!(done, Initialised::Made { .. }),
            key_made,
            atomic_create: repository.root().append_mode == AppendMode::AtomicCreate,
        };
        print::output(args.output.format, &report, table)
    })
}

/// The key file's, or a new one. It is made first: a repository whose key is lost cannot be used.
fn recovery_key(args: &InitArgs) -> Result<(KeyFile, bool), Failure> {
    let failure =
        |error: &dyn std::fmt::Display| Failure::new("key_file.unusable", ExitCode::Failed, Remedy::Operator, error);
    let path = &args.key_file;
    if path.exists() {
        let key = KeyFile::read(path).map_err(|error| failure(&error))?;
        if key.kind != KeyKind::Recovery {
            return Err(usage(format!(
                "{} is a host's key, and a repository is rooted in a recovery key\nHINT: name a new file to make one.",
                path.display()
            )));
        }
        return Ok((key, false));
    }
    let key = KeyFile::generate(KeyKind::Recovery).map_err(|error| failure(&error))?;
    key.create(path).map_err(|error| failure(&error))?;
    Ok((key, true))
}

fn table(report: &Report) -> String {
    let mut text = print::fields(&[
        ("repository", report.repository.clone()),
        ("url", report.url.clone()),
        ("state", if report.made { "made".into() } else { "was there already; nothing was changed".into() }),
        ("key file", report.key_file.clone()),
    ]);
    if report.key_made {
        text += "\nThe key file is new. Copy it to a safe place away from this host now: without it, and without any\n\
                 other host's key, no backup can ever be read again.\n";
    }
    if !report.atomic_create {
        text += "\nThis store does not create objects atomically: a host alone can restore from it, but not back up\n\
                 to it. Use a controller, or another store.\n";
    }
    text
}
