//! Who may do what in the tests' bucket: what deploy's least-privilege policy for hosts allows, and no more.

use std::path::PathBuf;

use s3s::access::{S3Access, S3AccessContext};
use s3s::dto::{DeleteObjectInput, DeleteObjectsInput, GetObjectInput, Range};
use s3s::{S3Request, S3Result, s3_error};

pub(super) struct HostPolicy {
    /// The served folder.
    pub(super) folder: PathBuf,
}

#[async_trait::async_trait]
impl S3Access for HostPolicy {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        match context.credentials() {
            Some(_) => Ok(()),
            None => Err(s3_error!(AccessDenied, "unsigned requests are refused")),
        }
    }

    async fn delete_object(&self, _: &mut S3Request<DeleteObjectInput>) -> S3Result<()> {
        Err(s3_error!(AccessDenied, "a host may not delete"))
    }

    async fn delete_objects(&self, _: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        Err(s3_error!(AccessDenied, "a host may not delete"))
    }

    /// Not a question of rights: s3s-fs 0.14 answers 500 to a suffix range longer than the object, where S3 gives all
    /// of it (RFC 9110, 14.1.2). Here the request can be mended after its signature was checked.
    async fn get_object(&self, request: &mut S3Request<GetObjectInput>) -> S3Result<()> {
        let input = &mut request.input;
        if let Some(Range::Suffix { length }) = input.range
            && let Ok(object) = tokio::fs::metadata(self.folder.join(&input.bucket).join(&input.key)).await
            && object.len() < length
        {
            input.range = Some(Range::Suffix { length: object.len() });
        }
        Ok(())
    }
}
