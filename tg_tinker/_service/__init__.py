"""What a ServiceClient can do, by subject: the connection, artifacts, data and its budget."""
