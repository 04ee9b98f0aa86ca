//! A real S3 server in this process, over HTTP with signed requests, whose answers can be spoiled.

