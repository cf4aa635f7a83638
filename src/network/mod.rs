//! The container's address: capture, fence, re-create, announce, replay.
