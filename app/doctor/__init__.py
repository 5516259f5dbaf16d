"""What `growmoe doctor` looks at: each module has one subject, and says what it found and what is wrong with it."""
