//! Our verbs' arguments, and the pass-through of everybody else's.
