//! The listener's own certificate: issued in memory, renewed before it ends, swapped without a restart.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_util::sync::CancellationToken;

use super::{Authority, AuthorityError};

/// After a renewal failed.
const RETRY: Duration = Duration::from_secs(60);

/// What new connections are shown.
pub struct ServerCertificate {
    authority: Arc<Authority>,
    names: Vec<String>,
    lifetime: Duration,
    current: RwLock<Arc<CertifiedKey>>,
}

impl std::fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerCertificate").field("names", &self.names).finish_non_exhaustive()
    }
}

impl ServerCertificate {
    /// For these host names and IP addresses.
    pub fn new(authority: Arc<Authority>, names: Vec<String>, lifetime: Duration) -> Result<Self, AuthorityError> {
        let current = RwLock::new(Arc::new(authority.server(&names, lifetime)?));
        Ok(Self { authority, names, lifetime, current })
    }

    pub fn renew(&self) -> Result<(), AuthorityError> {
        let fresh = Arc::new(self.authority.server(&self.names, self.lifetime)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Renews after two thirds of each certificate's life, until cancelled.
    pub async fn keep_fresh(&self, cancel: &CancellationToken) {
        let mut wait = self.lifetime * 2 / 3;
        while cancel.run_until_cancelled(tokio::time::sleep(wait)).await.is_some() {
            wait = match self.renew() {
                Ok(()) => {
                    tracing::info!("renewed the server certificate");
                    self.lifetime * 2 / 3
                }
                Err(error) => {
                    tracing::error!(%error, "cannot renew the server certificate");
                    RETRY.min(self.lifetime / 6)
                }
            };
        }
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}
