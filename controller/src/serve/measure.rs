//! Counts and times every call.

use std::task::{Context, Poll};
use std::time::Instant;

use futures::future::BoxFuture;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::identity::permission;
use crate::metrics::{CallLabels, Metrics};

#[derive(Clone)]
pub struct MeasureLayer {
    pub metrics: Metrics,
}

impl<S> Layer<S> for MeasureLayer {
    type Service = Measured<S>;

    fn layer(&self, inner: S) -> Measured<S> {
        Measured { metrics: self.metrics.clone(), inner }
    }
}

#[derive(Clone)]
pub struct Measured<S> {
    metrics: Metrics,
    inner: S,
}

impl<S, B, R> Service<http::Request<B>> for Measured<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
{
    type Response = http::Response<R>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<http::Response<R>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        // Of the table, so that a caller cannot make up labels.
        let (service, method) = permission::method(request.uri().path()).unwrap_or(("unknown", "unknown"));
        let (metrics, begun) = (self.metrics.clone(), Instant::now());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // A refusal is in the headers; a stream that began well ends in trailers that are not waited for.
            let code = Status::from_header_map(answer.headers()).map_or(Code::Ok, |status| status.code());
            metrics.calls.get_or_create(&CallLabels { service, method, code: code_name(code) }).inc();
            metrics.call_seconds.observe(begun.elapsed().as_secs_f64());
            Ok(answer)
        })
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
