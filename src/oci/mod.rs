//! The underlying runtime and the bundle, as types.
