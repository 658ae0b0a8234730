"Bytes and inputs that can be trusted: written whole, verified, fetched, and read without being executed."
