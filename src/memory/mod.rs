//! Memory of the container: which pages, reading, staging.
