"""What was seen, what was changed, what happened beside a control: claims that say how much they may say."""
