//! From a connection string to a session in replication mode. Without TLS, as the agent speaks to its own host.

use std::fmt;
use std::io;
use std::path::PathBuf;

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;
use rustix::net::sockopt;
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::Config;
use tokio_postgres::config::{self, Host, SslMode};

use super::connection::{Connection, Incoming, Socket};
use super::error::ReplicationError;
use super::refusal::Admission;
use crate::postgres::instance;
use crate::postgres::server::{CONNECT_TIMEOUT, KEEPALIVE, Target};

pub(super) const CONNECT: &str = "begin a replication session";
const DEFAULT_PORT: u16 = 5432;

/// Where a server may listen.
enum Address {
    Unix { dir: PathBuf, port: u16 },
    Tcp { host: String, port: u16 },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix { dir, port } => write!(f, "{} port {port}", dir.display()),
            Address::Tcp { host, port } => write!(f, "{host} port {port}"),
        }
    }
}

/// As whom.
struct Login {
    user: String,
    password: Option<Vec<u8>>,
    startup: BytesMut,
}

pub(super) async fn connect(connection: &str, application_name: &str) -> Result<Connection, ReplicationError> {
    let config: Config = connection.parse().map_err(|source| ReplicationError::ConnectionString { source })?;
    if config.get_ssl_mode() == SslMode::Require || config.get_channel_binding() == config::ChannelBinding::Require {
        return Err(ReplicationError::Tls);
    }
    let login = login(&config, application_name)?;
    let mut last = ReplicationError::Incomplete { missing: "host" };
    for address in addresses(&config) {
        let target = Target(format!("PostgreSQL at {address} as {}", login.user));
        let opening = tokio::time::timeout(CONNECT_TIMEOUT, open(&address, target.clone(), &login)).await;
        let seconds = CONNECT_TIMEOUT.as_secs();
        match opening.unwrap_or(Err(ReplicationError::NoAnswer { operation: CONNECT, target, seconds })) {
            Ok(connection) => return Ok(connection),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Each `hostaddr` stands for the `host` of its place; one port is everyone's.
fn addresses(config: &Config) -> Vec<Address> {
    let (hosts, hostaddrs, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let address = |index: usize| {
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
        match (hostaddrs.get(index), hosts.get(index)?) {
            (Some(ip), _) => Some(Address::Tcp { host: ip.to_string(), port }),
            (None, Host::Tcp(host)) => Some(Address::Tcp { host: host.clone(), port }),
            (None, Host::Unix(dir)) => Some(Address::Unix { dir: dir.clone(), port }),
        }
    };
    (0..hosts.len().max(hostaddrs.len())).filter_map(address).collect()
}

fn login(config: &Config, application_name: &str) -> Result<Login, ReplicationError> {
    let own = || instance::user_name(rustix::process::geteuid().as_raw());
    let user = config.get_user().map(str::to_owned).or_else(own);
    let user = user.ok_or(ReplicationError::Incomplete { missing: "user" })?;
    let mut parameters = vec![
        ("user", user.as_str()),
        ("replication", "true"),
        ("client_encoding", "UTF8"),
        ("application_name", application_name),
    ];
    parameters.extend(config.get_options().map(|options| ("options", options)));
    let mut startup = BytesMut::new();
    frontend::startup_message(parameters, &mut startup)
        .map_err(|source| ReplicationError::Unsendable { operation: CONNECT, source })?;
    Ok(Login { password: config.get_password().map(<[u8]>::to_vec), startup, user })
}

async fn open(address: &Address, target: Target, login: &Login) -> Result<Connection, ReplicationError> {
    let unreachable = |source| ReplicationError::Unreachable { target: target.clone(), source };
    let socket = match address {
        Address::Unix { dir, port } => {
            UnixStream::connect(dir.join(format!(".s.PGSQL.{port}"))).await.map(Socket::Unix).map_err(unreachable)?
        }
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(unreachable)?;
            notice_dead_peers(&stream).map_err(unreachable)?;
            Socket::Tcp(stream)
        }
    };
    let mut connection = Connection::new(socket, target);
    connection.outgoing().extend_from_slice(&login.startup);
    let is_local = matches!(address, Address::Unix { .. });
    authenticate(&mut connection, login, is_local).await?;
    Ok(connection)
}

/// As for the connections that speak SQL.
fn notice_dead_peers(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE / 3)?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, (2 * KEEPALIVE).as_millis() as u32)?;
    Ok(())
}

/// How far the server has come with knowing us, and we it.
enum Standing {
    Asked,
    /// A server that does not know the password either is found out by its last message, so that one must come.
    Scram(Box<ScramSha256>),
    Proved,
    Admitted,
}

async fn authenticate(connection: &mut Connection, login: &Login, is_local: bool) -> Result<(), ReplicationError> {
    let mut standing = Standing::Asked;
    loop {
        let Incoming::Message(message) = connection.receive(CONNECT).await? else {
            return Err(connection.unexpected(CONNECT));
        };
        standing = match (standing, message) {
            (Standing::Asked, Message::AuthenticationCleartextPassword) => {
                answer(connection, password(connection, login)?)?;
                Standing::Proved
            }
            (Standing::Asked, Message::AuthenticationMd5Password(body)) => {
                let hash = md5_hash(login.user.as_bytes(), password(connection, login)?, body.salt());
                answer(connection, hash.as_bytes())?;
                Standing::Proved
            }
            (Standing::Asked, Message::AuthenticationSasl(body)) => Standing::Scram(begin(connection, login, &body)?),
            (Standing::Scram(mut scram), Message::AuthenticationSaslContinue(body)) => {
                scram.update(body.data()).map_err(|error| unauthenticated(connection, error))?;
                let sent = frontend::sasl_response(scram.message(), connection.outgoing());
                sent.map_err(|source| ReplicationError::Unsendable { operation: CONNECT, source })?;
                Standing::Scram(scram)
            }
            (Standing::Scram(mut scram), Message::AuthenticationSaslFinal(body)) => {
                scram.finish(body.data()).map_err(|error| unauthenticated(connection, error))?;
                Standing::Proved
            }
            (Standing::Asked | Standing::Proved, Message::AuthenticationOk) => Standing::Admitted,
            (Standing::Admitted, Message::BackendKeyData(_)) => Standing::Admitted,
            (Standing::Admitted, Message::ReadyForQuery(_)) => return Ok(()),
            (_, Message::ErrorResponse(body)) => {
                let complaint = connection.complaint(CONNECT, &body)?;
                return Err(complaint.of_connecting(Admission { user: login.user.clone(), is_local }));
            }
            (
                Standing::Asked,
                Message::AuthenticationGss | Message::AuthenticationSspi | Message::AuthenticationKerberosV5,
            ) => {
                let method = io::Error::other("the server asks for Kerberos, which is not spoken here");
                return Err(unauthenticated(connection, method));
            }
            _ => return Err(connection.unexpected(CONNECT)),
        };
    }
}

fn begin(
    connection: &mut Connection,
    login: &Login,
    body: &AuthenticationSaslBody,
) -> Result<Box<ScramSha256>, ReplicationError> {
    let is_known = body.mechanisms().any(|name| Ok(name == SCRAM_SHA_256));
    if !is_known.map_err(|error| connection.malformed(CONNECT, error.to_string()))? {
        let found = io::Error::other("the server offers no SASL mechanism that is spoken here, SCRAM-SHA-256");
        return Err(unauthenticated(connection, found));
    }
    let scram = ScramSha256::new(password(connection, login)?, ChannelBinding::unsupported());
    frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), connection.outgoing())
        .map_err(|source| ReplicationError::Unsendable { operation: CONNECT, source })?;
    Ok(Box::new(scram))
}

fn answer(connection: &mut Connection, password: &[u8]) -> Result<(), ReplicationError> {
    frontend::password_message(password, connection.outgoing())
        .map_err(|source| ReplicationError::Unsendable { operation: CONNECT, source })
}

fn password<'l>(connection: &Connection, login: &'l Login) -> Result<&'l [u8], ReplicationError> {
    let missing = || unauthenticated(connection, io::Error::other("the server asks for a password, and none is given"));
    login.password.as_deref().ok_or_else(missing)
}

fn unauthenticated(connection: &Connection, source: io::Error) -> ReplicationError {
    ReplicationError::Unauthenticated { target: connection.target().clone(), source }
}
