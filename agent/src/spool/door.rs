//! Where other agents reach this one's spool. Connections are secured here, each with the certificate of the moment, and
//! handed on with the name of the agent at the other end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::Spool;
use super::keep::Keeper;
use super::trust::{self, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use crate::wire;

/// Agents have one connection for each cluster; a bound against others that only knock.
const CONNECTIONS: usize = 256;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Connections that shook hands and wait to be taken up: that is done at once.
const HANDED_ON: usize = 16;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The agent at the other end, as its certificate names it.
#[derive(Clone, Debug)]
pub struct AgentAtDoor(pub String);

/// Serves until told to stop.
pub async fn serve(spool: Arc<Spool>, listen: SocketAddr, stop: CancellationToken) -> Result<(), String> {
    let listener = TcpListener::bind(listen).await.map_err(|error| format!("listen on {listen}: {error}"))?;
    tracing::info!(%listen, "this host's spool may keep WAL of others");
    let (connections, accepted) = mpsc::channel(HANDED_ON);
    let accepting = accept_all(listener, Arc::clone(&spool), connections);
    let service = wire::spool_service(Arc::new(Keeper::new(spool)));
    let served = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .add_service(service)
        .serve_with_incoming(ReceiverStream::new(accepted));
    // Streams have no end of their own: what they kept is on disk, and acknowledged only then.
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        () = accepting => Ok(()),
        served = served => served.map_err(|error| error.to_string()),
    }
}

async fn accept_all(listener: TcpListener, spool: Arc<Spool>, connections: mpsc::Sender<io::Result<Accepted>>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the spool");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Closed at once if there is none.
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
        let (spool, connections) = (Arc::clone(&spool), connections.clone());
        tokio::spawn(async move {
            let greeted = tokio::time::timeout(HANDSHAKE, greet(&spool, stream)).await;
            match greeted.unwrap_or_else(|_| Err("no handshake in time".to_owned())) {
                Ok((tls, agent)) => {
                    let _ = connections.send(Ok(Accepted { tls, agent, _permit: permit })).await;
                }
                Err(reason) => tracing::info!(%address, reason, "refused a connection to the spool"),
            }
        });
    }
}

async fn greet(spool: &Spool, stream: TcpStream) -> Result<(TlsStream<TcpStream>, AgentAtDoor), String> {
    let identity = Arc::clone(&spool.identity.borrow());
    let config = trust::server_config(&identity).map_err(|error| error.to_string())?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let tls = TlsAcceptor::from(config).accept(stream).await.map_err(|error| error.to_string())?;
    let shown = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let agent = shown.and_then(trust::agent_of).ok_or("the certificate is not an agent's")?;
    Ok((tls, AgentAtDoor(agent)))
}

/// A connection after its handshake.
struct Accepted {
    tls: TlsStream<TcpStream>,
    agent: AgentAtDoor,
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Connected for Accepted {
    type ConnectInfo = AgentAtDoor;

    fn connect_info(&self) -> AgentAtDoor {
        self.agent.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(context, into)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}
