//! The calls, against a real state and fake agents over real streams. Who may call what is the gate's test.

mod agents;
mod courses;
mod fake_agent;
mod operators;
mod restores;
mod world;
