//! An operator's certificate renews itself: whoever works with the fleet now and then never logs in again.

use jiff::Timestamp;

use crate::certificate;
use crate::client::{CallError, Client};
use crate::context::Resolved;
use crate::failure::Failure;
use crate::when;

/// The client to go on with, and what the operator should know.
pub struct Renewed {
    pub client: Client,
    pub warning: Option<String>,
}

/// Renews the context's certificate if it is due. Only an expired one makes a failure of it: the command would fail too.
pub async fn renew_if_due(client: Client, resolved: &mut Resolved, now: Timestamp) -> Result<Renewed, Failure> {
    let Some(present) = certificate::describe(&resolved.context.certificate).filter(|present| present.is_due(now))
    else {
        return Ok(Renewed { client, warning: None });
    };
    match renew(&client, resolved, &present.name).await {
        Ok(renewed) => {
            // The old certificate serves until its end: a file that cannot be written costs nothing yet.
            let warning = resolved.store().err().map(|error| format!("warning: keep the renewed certificate: {error}"));
            Ok(Renewed { client: renewed, warning })
        }
        Err(error) if present.not_after <= now => Err(error.into()),
        Err(error) => {
            let end = when::full(present.not_after, now);
            let warning = format!("warning: the operator's certificate ends {end} and was not renewed: {error}");
            Ok(Renewed { client, warning: Some(warning) })
        }
    }
}

async fn renew(client: &Client, resolved: &mut Resolved, name: &str) -> Result<Client, CallError> {
    let request = certificate::request(name, &resolved.context.key).map_err(|error| CallError::Configuration {
        address: client.address().to_owned(),
        reason: error.to_string(),
    })?;
    let admission = client.renew(&request).await?;
    let mut context = resolved.context.clone();
    context.certificate = admission.certificate;
    context.authorities = admission.authorities;
    let client = Client::connect(&context).await?;
    resolved.context = context;
    Ok(client)
}
