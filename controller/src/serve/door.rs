//! The listener: accepts, limits, shakes hands, and hands on connections whose peer is known. It accepts TLS itself,
//! because tonic's own listener can swap neither certificate nor trust without a restart.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::identity::PeerIdentity;
use crate::metrics::{Metrics, RefusalLabels};

/// Connections that shook hands and wait for the server to take them up: it does so at once.
const HANDED_ON: usize = 64;
/// After `accept` failed, mostly for want of file descriptors: others must end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is known of the other end of a connection; every request carries it as an extension.
#[derive(Debug, Clone)]
pub struct Connection {
    /// `None`: no client certificate was shown.
    pub peer: Option<PeerIdentity>,
    pub address: SocketAddr,
}

pub struct Door {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    connections: Arc<Semaphore>,
    handshake_timeout: Duration,
    metrics: Metrics,
}

impl Door {
    pub async fn open(
        address: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        connections: u32,
        handshake_timeout: Duration,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let connections = Arc::new(Semaphore::new(connections as usize));
        Ok(Self { listener, acceptor: TlsAcceptor::from(tls), connections, handshake_timeout, metrics })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Accepts until cancelled, or until nobody takes the connections.
    pub fn connections(self, cancel: CancellationToken) -> ReceiverStream<io::Result<Accepted>> {
        let (sender, receiver) = mpsc::channel(HANDED_ON);
        tokio::spawn(async move { cancel.run_until_cancelled(self.accept_all(sender)).await });
        ReceiverStream::new(receiver)
    }

    async fn accept_all(self, sender: mpsc::Sender<io::Result<Accepted>>) {
        let mut was_full = false;
        while !sender.is_closed() {
            let (stream, address) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = self.connections.clone().try_acquire_owned() else {
                // Closed at once: the caller tries again later. Told once per stretch, counted each time.
                if !std::mem::replace(&mut was_full, true) {
                    tracing::warn!(%address, "limits.connections is reached, refusing connections");
                }
                self.refused("limit");
                continue;
            };
            was_full = false;
            let (acceptor, timeout) = (self.acceptor.clone(), self.handshake_timeout);
            let (metrics, sender) = (self.metrics.clone(), sender.clone());
            // Bounded by the permits and, in time, by the handshake's deadline.
            tokio::spawn(async move {
                let greeted = tokio::time::timeout(timeout, greet(acceptor, stream, address)).await;
                let greeted = greeted.unwrap_or(Err(Refused::Timeout));
                match greeted {
                    Ok((tls, connection)) => {
                        metrics.connections.inc();
                        let _ = sender.send(Ok(Accepted { tls, connection, metrics, _permit: permit })).await;
                    }
                    Err(refused) => {
                        let reason = refused.reason();
                        metrics.refused_connections.get_or_create(&RefusalLabels { reason }).inc();
                        tracing::info!(%address, reason, error = %refused, "refused a connection");
                    }
                }
            });
        }
    }

    fn refused(&self, reason: &'static str) {
        self.metrics.refused_connections.get_or_create(&RefusalLabels { reason }).inc();
    }
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("no handshake in time")]
    Timeout,
    #[error("{0}")]
    Handshake(io::Error),
    #[error("the certificate is signed by our authority, but names no member")]
    NoMember,
}

impl Refused {
    fn reason(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Handshake(_) => "handshake",
            Self::NoMember => "certificate",
        }
    }
}

async fn greet(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
) -> Result<(TlsStream<TcpStream>, Connection), Refused> {
    // Small messages both ways: waiting to fill a packet only delays them.
    stream.set_nodelay(true).map_err(Refused::Handshake)?;
    let tls = acceptor.accept(stream).await.map_err(Refused::Handshake)?;
    let shown = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let peer = match shown {
        None => None,
        Some(certificate) => Some(PeerIdentity::from_certificate(certificate).ok_or(Refused::NoMember)?),
    };
    Ok((tls, Connection { peer, address }))
}

/// A connection after its handshake.
pub struct Accepted {
    tls: TlsStream<TcpStream>,
    connection: Connection,
    metrics: Metrics,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Accepted {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Connected for Accepted {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
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

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}
