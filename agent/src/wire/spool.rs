//! The link between two agents' spools: the call, messages outward, messages inward, at both ends.

use std::sync::Arc;

use futures::FutureExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use walfleet_proto::spool::v1 as proto;

use super::{Reader, WireError};
use crate::spool::door::AgentAtDoor;
use crate::spool::keep::Keeper;
use crate::spool::message::{Begin, NumberedPiece, ToKeeper, WriterId};
use crate::spool::{MOST_PIECE_BYTES, PieceNumbers};

const BEGIN: Reader = Reader { message: "begin of a spool" };
const PIECE: Reader = Reader { message: "spooled piece" };

/// Beside the piece itself.
const MESSAGE_ROOM: usize = 4096;

/// Kept pieces on their way back: as many as may be on their way here, and the first answer.
const KEPT_DEPTH: usize = 64;

/// What the peer says to one that brings pieces.
pub struct Acknowledged(Streaming<proto::Kept>);

/// Opens the stream. Messages put into `outbound`'s sender go out in order.
pub async fn bring(channel: Channel, outbound: mpsc::Receiver<ToKeeper>) -> Result<Acknowledged, Status> {
    let mut client = proto::spool_client::SpoolClient::new(channel);
    let messages = ReceiverStream::new(outbound).map(to_keeper);
    Ok(Acknowledged(client.keep(messages).await?.into_inner()))
}

impl Acknowledged {
    /// Up to which piece everything is kept; `Ok(None)`: the peer closed the stream. Safe to drop while it waits.
    pub async fn next(&mut self) -> Result<Option<u64>, Status> {
        Ok(self.0.message().await?.map(|kept| kept.number))
    }
}

fn to_keeper(message: ToKeeper) -> proto::ToKeeper {
    use proto::to_keeper::Message;
    let message = match message {
        ToKeeper::Begin(begin) => Message::Begin(proto::Begin {
            cluster: begin.cluster.to_string(),
            system_identifier: begin.system_identifier,
            segment_bytes: begin.segment_bytes,
            writer: begin.writer.map(|writer| writer.0.to_vec().into()).unwrap_or_default(),
        }),
        ToKeeper::Piece(NumberedPiece { number, numbers, sealed }) => Message::Piece(proto::Piece {
            number,
            timeline: numbers.timeline,
            branch: numbers.branch.to_vec().into(),
            start_lsn: numbers.start_lsn,
            from: numbers.from,
            to: numbers.to,
            sealed,
        }),
        ToKeeper::Release(number) => Message::Release(proto::Release { number }),
    };
    proto::ToKeeper { message: Some(message) }
}

/// What another agent says to this one, which keeps its pieces.
pub struct Incoming {
    stream: Streaming<proto::ToKeeper>,
    begun: Option<Begin>,
}

impl Incoming {
    /// `Ok(None)`: the other one closed the stream. Safe to drop while it waits.
    pub async fn next(&mut self) -> Result<Option<ToKeeper>, Status> {
        let Some(message) = self.stream.message().await? else { return Ok(None) };
        self.read(message).map(Some).map_err(|error| Status::invalid_argument(error.to_string()))
    }

    /// What is there without waiting.
    pub fn at_hand(&mut self) -> Option<Result<Option<ToKeeper>, Status>> {
        self.next().now_or_never()
    }

    fn read(&mut self, message: proto::ToKeeper) -> Result<ToKeeper, WireError> {
        use proto::to_keeper::Message;
        let empty = Reader { message: "message to a spool" };
        Ok(match (message.message.ok_or(empty.missing("content"))?, &self.begun) {
            (Message::Begin(begin), _) => {
                let writer = match begin.writer.as_ref() {
                    [] => None,
                    bytes => Some(bytes.try_into().map_err(|_| BEGIN.value("writer", bytes, "it is 16 bytes"))?),
                };
                let begin = Begin {
                    cluster: BEGIN.parse("cluster", &begin.cluster)?,
                    system_identifier: begin.system_identifier,
                    segment_bytes: begin.segment_bytes,
                    writer: writer.map(WriterId),
                };
                self.begun = Some(begin.clone());
                ToKeeper::Begin(begin)
            }
            (Message::Piece(piece), Some(begun)) => {
                let branch = piece.branch.as_ref().try_into();
                let numbers = PieceNumbers {
                    system_identifier: begun.system_identifier,
                    timeline: piece.timeline,
                    branch: branch.map_err(|_| PIECE.value("branch", &piece.branch, "it is 8 bytes"))?,
                    start_lsn: piece.start_lsn,
                    segment_bytes: begun.segment_bytes,
                    from: piece.from,
                    to: piece.to,
                };
                ToKeeper::Piece(NumberedPiece { number: piece.number, numbers, sealed: piece.sealed })
            }
            (Message::Release(release), Some(_)) => ToKeeper::Release(release.number),
            (_, None) => return Err(BEGIN.missing("being the first message")),
        })
    }
}

/// The service as tonic serves it.
pub fn service(keeper: Arc<Keeper>) -> proto::spool_server::SpoolServer<Service> {
    proto::spool_server::SpoolServer::new(Service(keeper)).max_decoding_message_size(MOST_PIECE_BYTES + MESSAGE_ROOM)
}

pub struct Service(Arc<Keeper>);

type KeptStream = std::pin::Pin<Box<dyn Stream<Item = Result<proto::Kept, Status>> + Send>>;

#[tonic::async_trait]
impl proto::spool_server::Spool for Service {
    type KeepStream = KeptStream;

    async fn keep(&self, request: Request<Streaming<proto::ToKeeper>>) -> Result<Response<KeptStream>, Status> {
        let agent = request.extensions().get::<AgentAtDoor>().cloned();
        let agent = agent.ok_or_else(|| Status::unauthenticated("this call needs an agent's certificate"))?;
        let (kept, numbers) = mpsc::channel(KEPT_DEPTH);
        let (keeper, incoming) = (Arc::clone(&self.0), Incoming { stream: request.into_inner(), begun: None });
        tokio::spawn(async move {
            if let Err(status) = keeper.keep(&agent.0, incoming, &kept).await {
                let _ = kept.send(Err(status)).await;
            }
        });
        let numbers = ReceiverStream::new(numbers).map(|kept| kept.map(|number| proto::Kept { number }));
        Ok(Response::new(Box::pin(numbers)))
    }
}
