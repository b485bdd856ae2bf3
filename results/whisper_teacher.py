"""--teacher results/whisper_teacher.py:load is Whisper-tiny's encoder, 50 Hz.

pip install openai-whisper
"""

import torch
import whisper


class Encoder(torch.nn.Module):
    """Waveform [B, N] at 16 kHz, at most 30 s -> features [B, N // 320, 384]."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("place", torch.zeros(1, 1500, 1))
        # Positions say nothing of the sound: off, by what silence is answered.
        silence = self(torch.zeros(1, 480_000))
        self.place = silence - silence.mean(1)

    @torch.no_grad()
    def forward(self, wave):
        padded = whisper.pad_or_trim(wave)
        # One by one, since a batch is scaled by its loudest.
        mel = torch.stack([whisper.log_mel_spectrogram(w) for w in padded])
        x = self.net(mel) - self.place
        return x[:, : wave.shape[1] // 320]


def load():
    return Encoder(whisper.load_model("tiny", "cpu").encoder)
