//! Two agents over their own link: who is let in, for what, and what is on disk once it is answered for.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use walfleet_repository::key_file::{KeyFile, KeyKind};

use super::files::{Location, Owner, read};
use super::message::{Begin, NumberedPiece, ToKeeper, WriterId};
use super::*;
use crate::access::{HostKey, RepositoryAccess, SpoolGrant};
use crate::wire::{self, Acknowledged};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// As the controller issues them.
fn identity(authority: &Authority, kind: &str, name: &str) -> Arc<Identity> {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    let uri = format!("walfleet://{kind}/{name}?enrolment=1");
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key, authority).unwrap();
    Arc::new(Identity::of(name, key.serialize_pem(), certificate.pem(), authority.pem()))
}

fn repository() -> Arc<RepositoryAccess> {
    let (name, url) = ("main".to_owned(), "file:///r".to_owned());
    Arc::new(RepositoryAccess { name, url, options: BTreeMap::new(), root: None })
}

fn access(agents: &[&str]) -> Option<Arc<Access>> {
    let file = KeyFile::generate(KeyKind::Host).unwrap();
    let grant = SpoolGrant {
        cluster: "orders".parse().unwrap(),
        system_identifier: 7,
        repository: repository(),
        agents: agents.iter().map(|agent| (*agent).to_owned()).collect(),
    };
    Some(Arc::new(Access {
        member: "keeper".into(),
        key: Arc::new(HostKey { path: "/k".into(), file, chain: Vec::new() }),
        repositories: BTreeMap::new(),
        clusters: BTreeMap::new(),
        spools: vec![grant],
        problems: Vec::new(),
    }))
}

struct KeeperAtWork {
    authority: Authority,
    address: SocketAddr,
    access: watch::Sender<Option<Arc<Access>>>,
    _identity: watch::Sender<Arc<Identity>>,
    spools: Arc<Spools>,
    _folder: tempfile::TempDir,
}

async fn keeper() -> KeeperAtWork {
    let (authority, folder) = (authority(), tempfile::tempdir().unwrap());
    let spools = Spools::open(folder.path().join("spool"), 1 << 20).unwrap();
    let access = watch::Sender::new(access(&["db1"]));
    let identity = watch::Sender::new(identity(&authority, "agent", "keeper"));
    let spool = Spool { spools: Arc::clone(&spools), access: access.subscribe(), identity: identity.subscribe() };
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    tokio::spawn(door::serve(Arc::new(spool), address, CancellationToken::new()));
    while tokio::net::TcpStream::connect(address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    KeeperAtWork { authority, address, access, _identity: identity, spools, _folder: folder }
}

impl KeeperAtWork {
    async fn reach(&self, identity: &Identity, peer: &str) -> Result<tonic::transport::Channel, trust::TrustError> {
        trust::connect(identity, peer, &self.address.to_string()).await
    }

    async fn begin(&self, agent: &str, cluster: &str, system: u64) -> (mpsc::Sender<ToKeeper>, Acknowledged) {
        self.begin_as(None, agent, (cluster, system)).await
    }

    async fn begin_as(
        &self,
        writer: Option<WriterId>,
        agent: &str,
        (cluster, system): (&str, u64),
    ) -> (mpsc::Sender<ToKeeper>, Acknowledged) {
        let channel = self.reach(&identity(&self.authority, "agent", agent), "keeper").await.unwrap();
        let (outbound, waiting) = mpsc::channel(8);
        let (cluster, segment_bytes) = (cluster.parse().unwrap(), 16 << 20);
        let begin = Begin { cluster, system_identifier: system, segment_bytes, writer };
        outbound.send(ToKeeper::Begin(begin)).await.unwrap();
        (outbound, wire::bring(channel, waiting).await.unwrap())
    }
}

fn piece(number: u64, bytes: usize) -> ToKeeper {
    let numbers = PieceNumbers {
        system_identifier: 7,
        timeline: 1,
        branch: [0; 8],
        start_lsn: 3 << 24,
        segment_bytes: 16 << 20,
        from: number as u32 * 10,
        to: number as u32 * 10 + 10,
    };
    ToKeeper::Piece(NumberedPiece { number, numbers, sealed: vec![number as u8; bytes].into() })
}

#[tokio::test]
async fn what_is_answered_for_is_on_disk_and_stays_until_it_is_let_go_of() {
    let keeper = keeper().await;
    let (outbound, mut kept) = keeper.begin("db1", "orders", 7).await;
    assert_eq!(kept.next().await.unwrap(), Some(0));
    for number in 1..=3 {
        outbound.send(piece(number, 100)).await.unwrap();
    }
    while kept.next().await.unwrap().unwrap() < 3 {}
    // More than a spool of a megabyte takes.
    outbound.send(piece(4, 2 << 20)).await.unwrap();
    assert_eq!(kept.next().await.unwrap_err().code(), Code::ResourceExhausted);
    drop(outbound);
    let owner = Owner { cluster: "orders".parse().unwrap(), member: "db1".into() };
    let left = keeper.spools.left_for(Duration::ZERO);
    let found: Vec<u32> =
        left[&owner].iter().flat_map(|path| read(path).unwrap().pieces).map(|found| found.from).collect();
    assert_eq!(found, [10, 20, 30]);
    assert_eq!(keeper.spools.location(&owner).unwrap(), Some(Location::from(&*repository())));

    let (outbound, mut kept) = keeper.begin("db1", "orders", 7).await;
    assert_eq!(kept.next().await.unwrap(), Some(0));
    outbound.send(piece(1, 300 << 10)).await.unwrap();
    assert_eq!(kept.next().await.unwrap(), Some(1));
    let held = keeper.spools.held_bytes();
    outbound.send(ToKeeper::Release(1)).await.unwrap();
    while keeper.spools.held_bytes() >= held {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_writer_that_is_back_goes_on_behind_what_is_held_of_it_and_nobody_else_does() {
    let keeper = keeper().await;
    let owner = Owner { cluster: "orders".parse().unwrap(), member: "db1".into() };
    let one = Some(WriterId([1; 16]));
    let come = |writer| keeper.begin_as(writer, "db1", ("orders", 7));
    let (first, mut kept) = come(one).await;
    assert_eq!(kept.next().await.unwrap(), Some(0));
    for number in 1..=3 {
        first.send(piece(number, 200 << 10)).await.unwrap();
    }
    while kept.next().await.unwrap().unwrap() < 3 {}
    // The connection is cut off, and nobody has noticed: another of the same writer takes over at once.
    let (second, mut kept_again) = come(one).await;
    assert_eq!(kept_again.next().await.unwrap(), Some(3));
    assert_eq!(kept.next().await.unwrap_err().code(), Code::Aborted);
    // What was let go of meanwhile is told again, and what follows is no second copy: it would not fit.
    second.send(ToKeeper::Release(1)).await.unwrap();
    second.send(piece(4, 300 << 10)).await.unwrap();
    assert_eq!(kept_again.next().await.unwrap(), Some(4));
    let held = keeper.spools.held_bytes();
    // One that the spool has no room for is not held, whatever follows.
    second.send(piece(5, 600 << 10)).await.unwrap();
    assert_eq!(kept_again.next().await.unwrap_err().code(), Code::ResourceExhausted);
    while keeper.spools.left_for(Duration::ZERO).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (third, mut kept) = come(one).await;
    assert_eq!((kept.next().await.unwrap(), keeper.spools.held_bytes()), (Some(4), held));
    assert!(keeper.spools.left_for(Duration::ZERO).is_empty(), "it has a writer again");
    third.send(ToKeeper::Release(4)).await.unwrap();
    third.send(piece(5, 600 << 10)).await.unwrap();
    while kept.next().await.unwrap().unwrap() < 5 {}
    drop((third, second, first));
    while keeper.spools.left_for(Duration::ZERO).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let left = keeper.spools.left_for(Duration::ZERO);
    let found: Vec<u32> = left[&owner].iter().flat_map(|path| read(path).unwrap().pieces).map(|f| f.from).collect();
    assert_eq!(found, [50]);

    // Without a name, or with another, or once the repository was asked about it: from the start.
    for writer in [None, Some(WriterId([2; 16]))] {
        let (_outbound, mut kept) = come(writer).await;
        assert_eq!(kept.next().await.unwrap(), Some(0), "{writer:?}");
    }
    let (outbound, mut kept) = come(one).await;
    assert_eq!(kept.next().await.unwrap(), Some(0), "another had the seat meanwhile");
    outbound.send(piece(1, 1000)).await.unwrap();
    assert_eq!(kept.next().await.unwrap(), Some(1));
    let before = keeper.spools.left_for(Duration::ZERO)[&owner].len();
    drop((outbound, kept));
    while keeper.spools.left_for(Duration::ZERO)[&owner].len() == before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    keeper.spools.left_for(Duration::ZERO)[&owner].iter().for_each(|path| keeper.spools.note_damage(path));
    let (_outbound, mut kept) = come(one).await;
    assert_eq!(kept.next().await.unwrap(), Some(0), "what is damaged does not count");
}

#[tokio::test]
async fn nobody_is_let_in_but_the_agents_that_the_controller_names_for_what_it_names_them() {
    let keeper = keeper().await;
    for (agent, cluster, system) in [("db2", "orders", 7), ("db1", "billing", 7), ("db1", "orders", 8)] {
        let (_outbound, mut kept) = keeper.begin(agent, cluster, system).await;
        let refused = kept.next().await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{agent} {cluster} {system}: {refused:?}");
    }
    let own = identity(&keeper.authority, "agent", "db1");
    assert!(keeper.reach(&own, "keeper2").await.is_err(), "another agent answers than the one that is meant");
    let stranger = identity(&authority(), "agent", "db1");
    assert!(keeper.reach(&stranger, "keeper").await.is_err(), "of another fleet");
    let operator = identity(&keeper.authority, "operator", "db1");
    let reached = keeper.reach(&operator, "keeper").await;
    if let Ok(channel) = reached {
        let (outbound, waiting) = mpsc::channel(1);
        let (cluster, segment_bytes) = ("orders".parse().unwrap(), 16 << 20);
        let begin = Begin { cluster, system_identifier: 7, segment_bytes, writer: None };
        outbound.send(ToKeeper::Begin(begin)).await.unwrap();
        assert!(wire::bring(channel, waiting).await.is_err(), "an operator is no agent");
    }

    let (outbound, mut kept) = keeper.begin("db1", "orders", 7).await;
    assert_eq!(kept.next().await.unwrap(), Some(0));
    keeper.access.send_replace(access(&["db2"]));
    assert_eq!(kept.next().await.unwrap_err().code(), Code::PermissionDenied, "it is named no more");
    drop(outbound);
}

#[test]
fn numbers_that_name_no_piece_are_none() {
    let ToKeeper::Piece(NumberedPiece { numbers, .. }) = piece(1, 1) else { panic!() };
    assert!(numbers.place().is_some());
    for bad in [
        PieceNumbers { timeline: 0, ..numbers },
        PieceNumbers { start_lsn: numbers.start_lsn + 1, ..numbers },
        PieceNumbers { segment_bytes: 5, ..numbers },
        PieceNumbers { to: numbers.from, ..numbers },
        PieceNumbers { to: (16 << 20) + 1, ..numbers },
    ] {
        assert_eq!(bad.place(), None, "{bad:?}");
    }
}
