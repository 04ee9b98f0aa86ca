//! `init`: a new controller's folder with everything in it, and the first admin. Nothing is ever replaced: whatever
//! stands in the way is refused, and what was begun is taken away if the rest fails.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, bail};
use serde::Serialize;
use walfleet_repository::key_file::{KeyFile, KeyKind};

use super::{AdminArgs, InitArgs};
use crate::audit::{Actor, Audit};
use crate::config::Config;
use crate::identity::authority::{Subject, check_server_name, issue_with_new_key};
use crate::identity::member::{self, Member};
use crate::identity::{Authority, KeeperKey, MemberName, Role, now_us, secret_file};
use crate::serve::state_options;
use crate::state::{State, Txn, rows};

pub const CONFIG_FILE: &str = "controller.yaml";
pub const CONTEXT_FILE: &str = "admin.context.yaml";
pub const RECOVERY_KEY_FILE: &str = "recovery.key";

/// What `walfleet --context FILE` reads.
#[derive(Serialize)]
struct ContextFile {
    controller: String,
    authorities: String,
    certificate: String,
    key: String,
}

/// What `init` writes as configuration: what it was told, and the defaults by their absence.
#[derive(Serialize)]
struct ConfigFile<'a> {
    name: &'a str,
    listen: SocketAddr,
    server_names: &'a [String],
    directory: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<BTreeMap<&'static str, SocketAddr>>,
}

/// Makes the folder's content and says what to do next.
pub async fn init(args: &InitArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let (config, admin) = configuration(args)?;
    let recovery = args.recovery_key.as_deref().map(existing_key).transpose()?;
    let url = match &args.url {
        Some(url) => url.clone(),
        None => default_url(&config),
    };
    let made = make_folder(&config.directory)?;
    match fill(&config, &admin, &url, recovery).await {
        Ok(()) => {}
        Err(error) => {
            // Ours alone: the folder was empty. What cannot be removed is refused by the next `init`, by name.
            for entry in fs::read_dir(&config.directory).into_iter().flatten().flatten() {
                let _ = fs::remove_file(entry.path());
            }
            if made {
                let _ = fs::remove_dir(&config.directory);
            }
            return Err(error);
        }
    }
    let file = |name: &str| config.directory.join(name).display().to_string();
    write!(
        out,
        "A new walfleet controller lives in {directory}.\n\
         \n\
         1. Keep the recovery key in a safe place off this host, twice, and delete it here:\n\
         \x20    {recovery}\n\
         \x20  Whoever has it can read every backup; without it and without any host's key no backup can be read.\n\
         \x20  The controller never needs it.\n\
         2. Start the controller:\n\
         \x20    walfleet-controller run --config {config}\n\
         3. Talk to it as {admin}:\n\
         \x20    walfleet --context {context} status\n\
         4. Admit the first host:\n\
         \x20    walfleet --context {context} token create --role agent --ttl 1h\n",
        directory = config.directory.display(),
        recovery = match &args.recovery_key {
            Some(path) => path.display().to_string(),
            None => file(RECOVERY_KEY_FILE),
        },
        config = file(CONFIG_FILE),
        context = file(CONTEXT_FILE),
    )?;
    Ok(())
}

/// The arguments as a checked configuration, before anything is made.
fn configuration(args: &InitArgs) -> anyhow::Result<(Config, MemberName)> {
    for name in &args.san {
        check_server_name(name).context("--san")?;
    }
    let directory = std::path::absolute(&args.dir).context("--dir")?;
    let mut config = Config { listen: args.listen, server_names: args.san.clone(), directory, ..Config::default() };
    let name = args.name.clone().unwrap_or_else(|| config.controller_name());
    config.name = Some(name.parse::<MemberName>().context("--name")?.to_string());
    config.metrics.listen = args.metrics_listen;
    config.validate()?;
    Ok((config, args.admin.parse().context("--admin")?))
}

/// Whether the folder was made; an existing one must be empty.
fn make_folder(directory: &Path) -> anyhow::Result<bool> {
    match fs::read_dir(directory) {
        Ok(mut entries) => {
            if let Some(entry) = entries.next() {
                let found = entry.map(|entry| entry.file_name().display().to_string()).unwrap_or_default();
                bail!(
                    "{} is not empty, it holds {found:?}\nHINT: an authority is never replaced; name another --dir.",
                    directory.display()
                );
            }
            Ok(false)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let make = fs::DirBuilder::new().mode(0o700).recursive(true).create(directory);
            make.with_context(|| format!("make {}", directory.display()))?;
            Ok(true)
        }
        Err(error) => Err(error).with_context(|| format!("read {}", directory.display())),
    }
}

/// The key of repositories that exist already: with another, a new controller could never write to them.
fn existing_key(path: &Path) -> anyhow::Result<KeyFile> {
    let key = KeyFile::read(path).context("--recovery-key")?;
    if key.kind != KeyKind::Recovery {
        bail!(
            "--recovery-key: {} is a host's key\nHINT: name the recovery key that was made with the repository.",
            path.display()
        );
    }
    Ok(key)
}

/// `recovery`: an existing key, which stays where it is.
async fn fill(config: &Config, admin: &MemberName, url: &str, recovery: Option<KeyFile>) -> anyhow::Result<()> {
    let directory = &config.directory;
    let name = config.controller_name();
    let authority = Authority::create(directory, &name)?;
    let recovery = match recovery {
        Some(recovery) => recovery,
        None => {
            let made = KeyFile::generate(KeyKind::Recovery)?;
            made.create(&directory.join(RECOVERY_KEY_FILE))?;
            made
        }
    };
    KeeperKey::create(directory, &name, &recovery)?;
    let state = State::open(&config.state_path(), state_options(config))?;
    admit_admin(config, &state, &authority, admin, &directory.join(CONTEXT_FILE), url).await?;

    let metrics = config.metrics.listen.map(|listen| BTreeMap::from([("listen", listen)]));
    let file =
        ConfigFile { name: &name, listen: config.listen, server_names: &config.server_names, directory, metrics };
    let text = format!(
        "# Written by `walfleet-controller init`. Every option is in the sample deploy/controller.yaml.\n{}",
        serde_yaml_ng::to_string(&file)?
    );
    // Last: its presence says that the folder is whole.
    secret_file::create_public(&directory.join(CONFIG_FILE), text.as_bytes())?;
    Ok(())
}

/// `admin`: for the day when no admin's certificate is in force.
pub async fn admin(args: &AdminArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let config = Config::load(&args.config.config)?;
    let name: MemberName = args.name.parse().context("--name")?;
    let authority = Authority::load(&config.directory)?;
    let state = State::open(&config.state_path(), state_options(&config))?;
    crate::state::transfer::refuse_unfinished(&state).await?;
    let url = args.url.clone().unwrap_or_else(|| default_url(&config));
    admit_admin(&config, &state, &authority, &name, &args.out, &url).await?;
    writeln!(out, "{name} is an admin now: walfleet --context {} status", args.out.display())?;
    Ok(())
}

/// Gives an admin a key and a certificate without a token, and writes the context file.
async fn admit_admin(
    config: &Config,
    state: &State,
    authority: &Authority,
    name: &MemberName,
    context_file: &Path,
    url: &str,
) -> anyhow::Result<()> {
    // Unlike any token's id, and new each time: older certificates of this name are refused from here on.
    let enrolment = format!("init-{}", secret_file::hex(&rand::random::<[u8; 5]>()));
    let subject = Subject { name, role: Role::Admin, enrolment: &enrolment };
    let (key, issued, request) = issue_with_new_key(authority, &subject, config.certificates.lifetimes().operator)?;
    let context = ContextFile {
        controller: url.to_owned(),
        authorities: authority.pem().to_owned(),
        certificate: issued.pem,
        key,
    };
    let text =
        format!("# Who has this file is {name}, an admin of the fleet.\n{}", serde_yaml_ng::to_string(&context)?);
    secret_file::create(context_file, text.as_bytes())?;
    let row = Member {
        name: name.clone(),
        role: Role::Admin,
        enrolment,
        labels: BTreeMap::new(),
        hostname: crate::config::hostname(),
        key_fingerprint: request.key_fingerprint,
        writer_public_key: None,
        recipient: None,
        joined_at_us: now_us(),
        certificate_serial: issued.serial,
        certificate_not_after_us: issued.not_after_us,
        revoked_at_us: None,
        revoked_by: None,
    };
    state.txn(Txn::new().then(rows::put_row(member::key(name), &row)?)).await?;
    let actor = Actor { name: "the host's administrator".to_owned(), role: "controller".to_owned() };
    Audit::new(state.clone()).append(&actor, "walfleet-controller", &format!("admin {name}"), "done").await?;
    Ok(())
}

/// By the first name given, else by the address it listens on, else by the host's name.
fn default_url(config: &Config) -> String {
    let host = match config.server_names.first() {
        Some(name) => name.clone(),
        None if !config.listen.ip().is_unspecified() => config.listen.ip().to_string(),
        None => crate::config::hostname(),
    };
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    format!("https://{host}:{}", config.listen.port())
}
