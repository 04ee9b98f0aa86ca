//! Binding clusters to this host, and who can open what afterwards.

use super::*;
use crate::config::InstanceConfig;
use walfleet_repository::crypto::RecipientSecret;
use walfleet_repository::key_file::KeyKind;
use walfleet_repository::open::RepositorySpec;
use walfleet_repository::shipping::ShippingSpec;

fn desired_cluster(name: &str, member: bool) -> DesiredCluster {
    DesiredCluster {
        name: name.parse().unwrap(),
        repository: "main".into(),
        data_dir: Some("/from/controller".into()),
        recipients: Vec::new(),
        compression_level: Some(7),
        processes: None,
        member,
        shipping: ShippingSpec::NONE,
        spool_peer: None,
        relatives: Some(Vec::new()),
    }
}

fn config(instances: Vec<InstanceConfig>) -> Config {
    Config { instances, ..Config::default() }
}

fn instance(cluster: &str) -> InstanceConfig {
    InstanceConfig {
        cluster: cluster.parse().unwrap(),
        data_dir: "/from/config".into(),
        connection: Some("port=1".into()),
        lineage: Lineage::Shared,
    }
}

#[test]
fn an_instance_is_bound_only_where_the_host_is_a_member_and_as_its_configuration_says() {
    let repository = Arc::new(RepositoryAccess {
        name: "main".into(),
        url: "file:///x".into(),
        options: BTreeMap::new(),
        root: None,
    });
    let bound = |config: &Config, member| bind(config, &desired_cluster("orders", member), Arc::clone(&repository));
    let here = bound(&config(vec![instance("orders")]), true);
    assert_eq!(here.instance.unwrap().data_dir, Path::new("/from/config"));
    assert_eq!((here.compression_level, here.processes), (7, Config::default().backup.processes));
    let unconfigured = bound(&config(Vec::new()), true);
    assert_eq!(unconfigured.instance.unwrap().data_dir, Path::new("/from/controller"));
    assert!(bound(&config(vec![instance("orders")]), false).instance.is_none(), "a guest only restores");
}

/// A repository in a folder, its recovery key, and a host's key.
async fn repository(folder: &Path) -> (String, KeyFile, HostKey) {
    let recovery = KeyFile::generate(KeyKind::Recovery).unwrap();
    let root = Signer::from_seed(&recovery.signing_seed);
    let url = format!("file://{}", folder.display());
    let spec = RepositorySpec { root_public_key: root.public_key(), recovery_recipient: recovery.recipient.id() };
    Repository::init(Store::open(&url, &StoreOptions::default()).unwrap(), spec).await.unwrap();
    let path = folder.join("recovery.key");
    recovery.create(&path).unwrap();
    let key = HostKey::read(&path).unwrap();
    (url, recovery, key)
}

#[tokio::test]
async fn hosts_that_may_restore_are_granted_the_key_and_others_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let (url, recovery, key) = repository(folder.path()).await;
    let config = config(vec![instance("orders")]);
    let own = RepositoryConfig { url, options: BTreeMap::new(), key_file: key.path.clone() };
    let mut access = Access::standalone(&config, "db1".into(), &own, key);
    let (guest, stranger) = (RecipientSecret::generate().unwrap(), RecipientSecret::generate().unwrap());
    let name: ClusterName = "orders".parse().unwrap();
    let cluster = access.clusters.get_mut(&name).unwrap();
    cluster.recipients = vec![Recipient { label: "db2".into(), public_key: guest.id().0 }];
    // Nothing lies in its data directory that could tell whose copy it is.
    cluster.relatives = Relatives::None;

    let (sender, receiver) = tokio::sync::watch::channel(Some(Arc::new(access.clone())));
    let cancel = tokio_util::sync::CancellationToken::new();
    let granting = tokio::spawn(grant::keep_granted(receiver, cancel.clone()));
    let repository = access.repository(OWN_REPOSITORY).unwrap();
    let opens = async |secret: &RecipientSecret| {
        let repository = repository.open().await.unwrap();
        OpenCluster::open(repository, name.clone(), secret).await.is_ok()
    };
    for _ in 0..500 {
        if opens(&guest).await {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(opens(&guest).await && opens(&recovery.recipient).await);
    assert!(!opens(&stranger).await);
    cancel.cancel();
    granting.await.unwrap();
    drop(sender);
}

#[tokio::test]
async fn a_repository_with_another_root_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (url, _, _) = repository(folder.path()).await;
    let access =
        RepositoryAccess { name: "main".into(), url, options: BTreeMap::new(), root: Some(PublicKey([9; 32])) };
    let failure: Failure = access.open().await.unwrap_err().into();
    assert_eq!((failure.code, failure.exit), ("repository.foreign", ExitCode::Refused));
}
