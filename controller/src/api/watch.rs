//! A job as it is now, then at every change, until it is over.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use walfleet_proto::operator::v1::JobView;
use walfleet_repository::ids::JobId;

use super::Api;
use super::status::of_job;
use crate::identity::PeerIdentity;

/// Faster than a person reads, slow enough that many watchers of a busy job cost little.
const PACE: Duration = Duration::from_millis(200);

/// Follows a job. A reader that is slow gets the newest view, not all of them.
pub fn follow(api: Api, peer: PeerIdentity, job: JobId) -> ReceiverStream<Result<JobView, Status>> {
    // One: what a reader has not taken is replaced by what is newer when it does.
    let (views, stream) = mpsc::channel(1);
    // Ends with the job, the reader, the reader's rights, or the controller.
    let tasks = api.tasks.clone();
    tasks.spawn("job watch", async move {
        let end = tokio::select! {
            end = send_changes(&api, &job, &views) => end,
            refusal = api.reconciler.roster.until_refused(&peer) => Err(refusal.into()),
            () = api.cancel.cancelled() => Err(Status::unavailable("the controller is stopping\nHINT: the job goes on; watch it again later.")),
        };
        if let Err(status) = end {
            // A reader that is gone needs no reason.
            let _ = views.send(Err(status)).await;
        }
    });
    ReceiverStream::new(stream)
}

async fn send_changes(api: &Api, job: &JobId, views: &mpsc::Sender<Result<JobView, Status>>) -> Result<(), Status> {
    let mut changes = api.reconciler.jobs.subscribe();
    let mut progress = api.reconciler.fleet.subscribe_progress();
    let mut shown: Option<JobView> = None;
    loop {
        // Marked before reading: what changes after the reading wakes the wait below.
        changes.borrow_and_update();
        progress.borrow_and_update();
        let row = api.reconciler.jobs.get(job).await.map_err(of_job)?;
        let view = api.job_view(&row);
        if shown.as_ref() != Some(&view) {
            if views.send(Ok(view.clone())).await.is_err() {
                return Ok(());
            }
            shown = Some(view);
        }
        if row.is_over() {
            return Ok(());
        }
        tokio::select! {
            () = views.closed() => return Ok(()),
            _ = changes.changed() => {}
            _ = progress.changed() => {}
        }
        tokio::time::sleep(PACE).await;
    }
}
