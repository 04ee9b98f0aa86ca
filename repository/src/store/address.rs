//! Where a repository lies: `file:///path` or `s3://bucket/prefix`, and what is needed to reach it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use url::Url;

use super::attempt::RetryPolicy;
use super::error::{Operation, StoreError, StoreErrorKind};
use super::folder::FolderStore;

/// What to do about a folder that is not there.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum Folder {
    /// Refuse: a mount that is missing must not become an empty repository.
    #[default]
    MustExist,
    Create,
}

/// How to reach a store.
#[derive(Clone, Default)]
pub struct StoreOptions {
    pub folder: Folder,
    /// For S3: `endpoint`, `region`, `allow_http`, `virtual_hosted_style`, `checksum`, `sse_kms_key_id`, and, where the
    /// environment (AWS_…) does not give them, `access_key_id`, `secret_access_key` and `session_token`.
    pub settings: BTreeMap<String, String>,
    pub retry: RetryPolicy,
}

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The settings can hold secrets: only their names are shown.
        let names: Vec<_> = self.settings.keys().collect();
        f.debug_struct("StoreOptions").field("folder", &self.folder).field("settings", &names).finish_non_exhaustive()
    }
}

pub(super) struct Backend {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) folder: Option<PathBuf>,
}

const KNOWN_SETTINGS: &str = "endpoint, region, allow_http, virtual_hosted_style, checksum, sse_kms_key_id, \
                              access_key_id, secret_access_key, session_token";

pub(super) fn open(text: &str, options: &StoreOptions) -> Result<Backend, StoreError> {
    let unusable = |why: String| StoreError::new(Operation::Open, text, StoreErrorKind::Unusable(why));
    let url = Url::parse(text).map_err(|error| {
        unusable(format!("not a repository URL: {error}\nHINT: write file:///path/to/folder or s3://bucket/prefix."))
    })?;
    if !url.username().is_empty() || url.password().is_some() {
        let why =
            "a repository URL holds no credentials\nHINT: give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.";
        // The text itself is not repeated: it holds the secret.
        return Err(StoreError::new(Operation::Open, "…", StoreErrorKind::Unusable(why.to_owned())));
    }
    match url.scheme() {
        "file" => open_folder(text, &url, options),
        "s3" => open_s3(text, &url, options),
        scheme => {
            Err(unusable(format!("\"{scheme}\" is not a kind of store\nHINT: use file:///path or s3://bucket/prefix.")))
        }
    }
}

fn open_folder(text: &str, url: &Url, options: &StoreOptions) -> Result<Backend, StoreError> {
    let unusable = |why: String| StoreError::new(Operation::Open, text, StoreErrorKind::Unusable(why));
    if let Some(name) = options.settings.keys().next() {
        return Err(unusable(format!("a folder has no setting \"{name}\"")));
    }
    let path = url
        .to_file_path()
        .map_err(|()| unusable("not an absolute path\nHINT: write three slashes, as in file:///backups.".to_owned()))?;
    if options.folder == Folder::Create {
        std::fs::create_dir_all(&path)
            .map_err(|source| unusable(format!("create folder {}", path.display())).with_cause(&source))?;
    }
    if !path.is_dir() {
        let hint = "HINT: check the mount, or make the folder with \"repository init\".";
        return Err(unusable(format!("{} is not a folder\n{hint}", path.display())));
    }
    let store = LocalFileSystem::new_with_prefix(&path)
        .map_err(|source| unusable(format!("open folder {}", path.display())).with_cause(&source))?
        .with_fsync(true)
        // Folders in which nothing is left would be walked through for ever.
        .with_automatic_cleanup(true);
    Ok(Backend { store: Arc::new(FolderStore::new(store)), folder: Some(path) })
}

fn open_s3(text: &str, url: &Url, options: &StoreOptions) -> Result<Backend, StoreError> {
    let unusable = |why: String| StoreError::new(Operation::Open, text, StoreErrorKind::Unusable(why));
    let bucket = url.host_str().filter(|host| !host.is_empty());
    let bucket = bucket.ok_or_else(|| unusable("no bucket\nHINT: write s3://bucket/prefix.".to_owned()))?;
    let prefix = Path::from_url_path(url.path())
        .map_err(|source| unusable("the prefix is not a key".to_owned()).with_cause(&source))?;

    let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
    for (name, value) in &options.settings {
        builder = apply_setting(builder, name, value).map_err(unusable)?;
    }
    // object_store answers with its own defaults for what nobody set; both readings of "https" must agree with them.
    let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
    let plain_http = endpoint.is_some_and(|endpoint| endpoint.starts_with("http://"));
    let allow_http = options.settings.get("allow_http").is_some_and(|value| value == "true");
    let store = builder
        // Over TLS the payload is protected already; signing it costs a SHA-256 of every byte.
        .with_unsigned_payload(!plain_http)
        .with_retry(no_retries())
        // Attempts have limits of their own, by the bytes they move: see `RetryPolicy`.
        .with_client_options(
            ClientOptions::new().with_timeout_disabled().with_connect_timeout(Duration::from_secs(10)).with_allow_http(
                allow_http || plain_http && std::env::var("AWS_ALLOW_HTTP").is_ok_and(|v| v == "true"),
            ),
        )
        .build()
        .map_err(|source| unusable("the settings do not make a store".to_owned()).with_cause(&source))?;
    let store: Arc<dyn ObjectStore> =
        if prefix.is_root() { Arc::new(store) } else { Arc::new(PrefixStore::new(store, prefix)) };
    Ok(Backend { store, folder: None })
}

fn apply_setting(builder: AmazonS3Builder, name: &str, value: &str) -> Result<AmazonS3Builder, String> {
    let flag = || match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(format!("setting {name} is \"{value}\"\nHINT: it is true or false.")),
    };
    Ok(match name {
        "endpoint" => builder.with_endpoint(value),
        "region" => builder.with_region(value),
        "allow_http" => builder.with_allow_http(flag()?),
        "virtual_hosted_style" => builder.with_virtual_hosted_style_request(flag()?),
        "access_key_id" => builder.with_access_key_id(value),
        "secret_access_key" => builder.with_secret_access_key(value),
        "session_token" => builder.with_token(value),
        "sse_kms_key_id" => builder.with_sse_kms_encryption(value),
        "checksum" => match value {
            "none" => builder,
            "sha256" => builder.with_checksum_algorithm(Checksum::SHA256),
            "crc64nvme" => builder.with_checksum_algorithm(Checksum::CRC64NVME),
            _ => return Err(format!("setting checksum is \"{value}\"\nHINT: it is none, crc64nvme or sha256.")),
        },
        _ => return Err(format!("unknown setting \"{name}\"\nHINT: known are {KNOWN_SETTINGS}.")),
    })
}

fn no_retries() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: Duration::ZERO }
}
