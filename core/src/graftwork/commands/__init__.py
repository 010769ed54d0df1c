"""What each verb of the command line does. Imported only when its verb is called."""
