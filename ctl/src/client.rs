//! The connection to a controller: made once per command, over mutual TLS, with deadlines.
//!
//! What is said over it lives in `wire`.

mod failure;
pub mod pinned;

use std::time::Duration;

use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use walfleet_proto::telemetry;

use crate::context::{Address, Context};
pub use failure::CallError;

/// A controller in another region answers a TLS handshake well within this; a firewall that drops packets never does.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For every call but streams. The slowest, `apply` on a large fleet, is one state transaction.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// So that a watch notices a controller's host that vanished without a word.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// A status of 10,000 clusters with their windows; gRPC's default of 4 MiB holds about a thousand.
pub const LARGEST_ANSWER: usize = 256 << 20;

type Trace = fn(tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status>;
/// The channel, with the trace context of the running command on every call.
pub type Transport = InterceptedService<Channel, Trace>;

#[derive(Clone)]
pub struct Client {
    channel: Channel,
    address: String,
}

impl Client {
    /// Connects and proves both identities. With TLS 1.3 a refusal of ours can show up only at the first call.
    pub async fn connect(context: &Context) -> Result<Client, CallError> {
        let address = Address::parse(&context.controller);
        let name = address.as_ref().map_or_else(|| context.controller.clone(), |address| address.name.clone());
        let bad = |error: tonic::transport::Error| CallError::configuration(&name, &error);
        let mut endpoint = endpoint(&context.controller).map_err(bad)?;
        if address.is_some_and(|address| address.encrypted) {
            let mut tls = ClientTlsConfig::new()
                .ca_certificate(Certificate::from_pem(&context.authorities))
                .identity(Identity::from_pem(&context.certificate, &context.key));
            if let Some(server_name) = &context.server_name {
                tls = tls.domain_name(server_name);
            }
            endpoint = endpoint.tls_config(tls).map_err(bad)?;
        }
        Client::open(endpoint, name).await
    }

    async fn open(endpoint: Endpoint, address: String) -> Result<Client, CallError> {
        match endpoint.connect().await {
            Ok(channel) => Ok(Client { channel, address }),
            Err(error) => Err(CallError::not_connected(&address, &error)),
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn transport(&self) -> Transport {
        InterceptedService::new(self.channel.clone(), telemetry::inject as Trace)
    }

    /// A call with the usual deadline.
    pub(crate) fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(CALL_TIMEOUT);
        request
    }

    /// Turns the status of `operation` ("list clusters") into what an operator can act on.
    pub(crate) fn failed(&self, operation: &'static str) -> impl FnOnce(tonic::Status) -> CallError {
        let address = self.address.clone();
        move |status| CallError::of_status(operation, &address, &status)
    }
}

fn endpoint(url: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(url.to_owned())?
        .user_agent(concat!("walfleet/", env!("CARGO_PKG_VERSION")))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_keepalive(Some(KEEPALIVE))
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE))
}
