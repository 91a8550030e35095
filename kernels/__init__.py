"""Operations of the pass, one per file: a plain torch form that defines it, and faster forms chosen in one place."""
