//! `walfleet login`

use clap::Args;

use crate::certificate;
use crate::client::Client;
use crate::client::pinned::Token;
use crate::context::{Address, Context, ContextError, Contexts, Overwrite};
use crate::failure::Failure;
use crate::session::Session;
use crate::view::context::LoggedIn;
use crate::wire::Admission;

/// Become an operator of a fleet, with a token from one of its admins
///
/// Makes a key on this machine, has the controller sign it, and keeps both as a context. The controller proves itself
/// first: the token names the fleet's certificate authority.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  walfleet login --controller https://walfleet.example.org:7400 --token wft_...
  pass show walfleet-token | \\
    walfleet login --controller https://walfleet.example.org:7400 --token -")]
pub struct LoginArgs {
    /// The controller
    #[arg(long, value_name = "URL")]
    controller: String,
    /// The token; - reads it from standard input, where other users of this machine cannot see it
    #[arg(long)]
    token: String,
    /// The operator's name in the fleet [default: the user's]
    #[arg(long)]
    name: Option<String>,
    /// Keep it under this name [default: the controller's host]
    #[arg(long, value_name = "CONTEXT")]
    save_as: Option<String>,
    /// Replace a context of that name that belongs to another controller
    #[arg(long)]
    force: bool,
}

impl LoginArgs {
    pub async fn run(self, session: &mut Session<'_>) -> Result<(), Failure> {
        let typed = if self.token == "-" { session.read_input("-".as_ref())? } else { self.token.clone() };
        let token = Token::parse(&typed)?;
        let url = self.controller.trim_end_matches('/').to_owned();
        check_url(&url)?;
        let name = self.operator_name(session)?;
        let contexts = Contexts::of(session.surroundings)?;
        let context_name = self.save_as.clone().unwrap_or_else(|| context_name(&url));
        // Before the token is spent: it works only once.
        let overwrite = self.overwrite(&contexts, &context_name, &url)?;
        let identity = |error: rcgen::Error| Failure::Identity { operation: "make a key", reason: error.to_string() };
        // A name that is alive is given out again only to its own key.
        let key = match known_key(&contexts, &url, &name)? {
            Some(key) => key,
            None => certificate::new_key().map_err(identity)?,
        };
        let request = certificate::request(&name, &key).map_err(identity)?;
        let client = Client::connect_pinned(&url, &token).await?;
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let admission = client.join(&token, &name, &request, hostname.trim()).await?;
        if admission.role == "agent" {
            return Err(Failure::AgentToken);
        }
        let context = context_of(url, &admission, key);
        let path = contexts.save(&context_name, &context, overwrite)?;
        contexts.choose(&context_name)?;
        // The proof that it works: the first call under the new certificate.
        let caller = Client::connect(&context).await?.who_am_i().await?;
        session.show(&LoggedIn {
            context: context_name,
            controller: context.controller,
            name: caller.name,
            role: caller.role,
            certificate_not_after: caller.certificate_not_after.or(admission.not_after),
            path: path.display().to_string(),
        })
    }

    fn operator_name(&self, session: &Session<'_>) -> Result<String, Failure> {
        let chosen = self.name.clone().or_else(|| session.surroundings.user().map(str::to_lowercase));
        let name = chosen
            .ok_or_else(|| Failure::Usage("the user has no name here\nHINT: give one with --name.".to_owned()))?;
        let fits = (1..=63).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_'));
        if fits {
            return Ok(name);
        }
        Err(Failure::Usage(format!(
            "\"{name}\" cannot be an operator's name\nHINT: use 1 to 63 of a-z, 0-9, '-', '.' and '_' with --name."
        )))
    }

    /// Logging in again to the same controller renews its context.
    fn overwrite(&self, contexts: &Contexts, name: &str, url: &str) -> Result<Overwrite, ContextError> {
        let same = |known: &crate::context::Known| {
            known.name == name && known.content.as_ref().is_ok_and(|context| context.controller == url)
        };
        if self.force || contexts.list()?.iter().any(same) {
            return Ok(Overwrite::Replace);
        }
        contexts.check_free(name).map(|()| Overwrite::Refuse)
    }
}

/// The key that this operator has at this controller already.
fn known_key(contexts: &Contexts, url: &str, name: &str) -> Result<Option<String>, ContextError> {
    let held = contexts.list()?.into_iter().filter_map(|known| known.content.ok()).find(|context| {
        let holder = certificate::describe(&context.certificate).map(|present| present.name);
        context.controller == url && holder.as_deref() == Some(name)
    });
    Ok(held.map(|context| context.key))
}

fn check_url(url: &str) -> Result<(), Failure> {
    let hint = "HINT: write it as https://HOST:PORT.";
    match Address::parse(url) {
        None => Err(Failure::Usage(format!("\"{url}\" is not a controller's URL\n{hint}"))),
        Some(Address { encrypted: false, loopback: false, .. }) => {
            Err(Failure::Usage(format!("a token is not sent without encryption to {url}\n{hint}")))
        }
        Some(_) => Ok(()),
    }
}

fn context_of(controller: String, admission: &Admission, key: String) -> Context {
    Context {
        controller,
        server_name: None,
        authorities: admission.authorities.clone(),
        certificate: admission.certificate.clone(),
        key,
    }
}

/// `https://walfleet.example.org:7400` is kept as walfleet.example.org; what cannot name a context, as "default".
fn context_name(url: &str) -> String {
    let host = Address::parse(url).map(|address| address.name).unwrap_or_default();
    let host = if host.starts_with('[') { "" } else { host.split(':').next().unwrap_or_default() };
    if host.is_empty() { "default".to_owned() } else { host.to_owned() }
}
