//! What two agents say to each other about pieces.

use bytes::Bytes;
use walfleet_repository::ids::ClusterName;

use super::PieceNumbers;

/// Of the host that brings pieces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToKeeper {
    Begin(Begin),
    Piece(NumberedPiece),
    /// The repository has everything up to this piece.
    Release(u64),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Begin {
    pub cluster: ClusterName,
    pub system_identifier: u64,
    /// Of all pieces that follow.
    pub segment_bytes: u32,
    /// `None`: of an agent that brings everything again after each new connection.
    pub writer: Option<WriterId>,
}

/// Whoever numbers pieces, for as long as the numbers go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WriterId(pub [u8; 16]);

impl WriterId {
    pub fn random() -> WriterId {
        WriterId(rand::random())
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NumberedPiece {
    pub number: u64,
    pub numbers: PieceNumbers,
    pub sealed: Bytes,
}
