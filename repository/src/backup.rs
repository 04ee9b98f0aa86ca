//! Writing a backup's content into packs, and reading it back.
//!
//! [`mod@write`] finds what a parent has, packs and uploads the rest; [`file_list`] turns placed content into file maps and
//! the file list; [`commit`] publishes. [`read`] opens a committed backup; [`fetch`] brings its chunks, coalesced and in
//! parallel, to whoever writes them down.

pub mod commit;
pub mod fetch;
pub mod file_list;
pub mod read;
pub mod write;

#[cfg(test)]
mod tests;
