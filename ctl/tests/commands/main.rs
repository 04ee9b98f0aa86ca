//! The whole program against a controller in this process: what operators type, what they read, what scripts get.
//!
//! The controller answers from canned data; no command is faked. Views and help texts are compared with the files in
//! `tests/transcripts`; `UPDATE_TRANSCRIPTS=1 cargo test -p walfleet-ctl` writes them anew.

mod canned;
mod contexts;
mod controller;
mod following;
mod identity;
mod terminal;
mod transcript;
mod views;
