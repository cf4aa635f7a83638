//! Root file system and volumes: what both hosts see.
